"""benchmarks/gpu_work.py on a GPU that is none: kernels run as programs on the CPU. What is called `broken` dies.

Takes what gpu_work.py takes, so that gpu.py's processes may be this one.
"""

import os
import sys
from pathlib import Path

import simulated_gpu
from kdagen.autotune import cases
from kdagen.autotune.worker import serve

from kdagen.runtime import loader

FACTS = {"gpu": "A simulated GPU", "multiprocessors": 1, "l2_bytes": 1, "versions": {}, "state": {}, "date": ""}


class Patch:
    """pytest's monkeypatch, for good."""

    setattr = staticmethod(setattr)


def functions(kernels):
    if "broken" in str(kernels.folder):
        os.abort()
    return run_as_programs(kernels)


run_as_programs = simulated_gpu.functions


def main(folders: list[str], mark: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import gpu_contenders
    import gpu_correct
    import gpu_timing
    import gpu_work

    simulated_gpu.install_device(Patch)
    loader.LoadedOp.functions = functions
    gpu_timing.facts, gpu_timing.state = lambda: FACTS, dict
    gpu_timing.ceilings = lambda: {"copy_bytes_a_second": 1e9, "bf16_flops_a_second": 1e12}
    gpu_contenders.DEVICE = "cpu"
    cases.SHORT, cases.LONG = (1, 0, 17), (33,)
    gpu_correct.SHAPES, gpu_correct.REPLAYS = dict.fromkeys(gpu_correct.SHAPES, (1, 20, 1)), 2
    with simulated_gpu.streams(Patch):
        serve(lambda marks: gpu_work.Bench([Path(folder) for folder in folders], marks), int(mark))


if __name__ == "__main__":
    main(sys.argv[1:-2], sys.argv[-1])
