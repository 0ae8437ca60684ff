"""A process that compiles kernels for the builder: `python -m kdagen.build.worker CACHE_DIR`.

One job a line on stdin (JSON), answers a line each on stdout: {"stage": ...} as it goes, then {"cached": ...} or
{"error": ..., "death": ...}, where a death is told if it may go well another time. A process of our own rather than
multiprocessing's, which would import the user's script again.
It ends when its stdin does, so it does not outlive the builder by more than one job.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from kdagen import errors
from kdagen.build.cache import Cache
from kdagen.build.kernel import Job, compile_kernel
from kdagen.errors import KdagenError


def serve(cache: Cache, requests, answer) -> None:
    """Does each request in turn."""
    for line in requests:
        request = json.loads(line)
        try:
            answer(cached=_compile(cache, request["key"], Job(**request["job"]), answer))
        except KdagenError as error:
            kind = next(c.__name__ for c in type(error).__mro__ if hasattr(errors, c.__name__))
            answer(error=kind, message=str(error), trace=traceback.format_exc(), death=getattr(error, "death", ""))
        except Exception as error:  # another try may go well: perhaps the disk is full
            message = f"{request['job']['name']}: {type(error).__name__}: {error} (a bug in kdagen)"
            death = "out of memory" if isinstance(error, MemoryError) else "crash"
            answer(error="ToolchainError", message=message, trace=traceback.format_exc(), death=death)


def _compile(cache: Cache, key: str, job: Job, answer) -> bool:
    """Whether the kernel was cached after all (another build may have made it meanwhile)."""
    say = lambda stage, **more: answer(stage=stage, **more)  # noqa: E731
    return cache.make(key, lambda folder: compile_kernel(job, folder, say))[1]


def main() -> None:
    # Whatever TileLang or nvcc print must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    serve(Cache(Path(sys.argv[1])), sys.stdin, answer)


if __name__ == "__main__":
    main()
