"""A process that compiles kernels for the builder: `python -m kdagen.build.worker CACHE_DIR`.

One job a line on stdin (JSON), answers a line each on stdout: {"stage": ...} as it goes, then {"cached": ...} or
{"error": ...}. A process of our own rather than multiprocessing's, which would import the user's script again.
It ends when its stdin does, so it does not outlive the builder by more than one job.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from kdagen.build.cache import Cache
from kdagen.build.kernel import Job, compile_kernel
from kdagen.errors import KdagenError, ToolchainError


def serve(cache: Cache, requests, answer) -> None:
    """Does each request in turn."""
    for line in requests:
        request = json.loads(line)
        try:
            answer(cached=_compile(cache, request["key"], Job(**request["job"]), answer))
        except Exception as error:
            ours = isinstance(error, KdagenError)
            message = (
                str(error) if ours else f"{request['job']['name']}: {type(error).__name__}: {error} (a bug in kdagen)"
            )
            answer(
                error=type(error if ours else ToolchainError()).__name__, message=message, trace=traceback.format_exc()
            )


def _compile(cache: Cache, key: str, job: Job, answer) -> bool:
    """Whether the kernel was cached after all (another build may have made it meanwhile)."""
    return cache.make(key, lambda folder: compile_kernel(job, folder, lambda stage: answer(stage=stage)))[1]


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
