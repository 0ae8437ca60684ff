"""Emitted CUDA, executed on the CPU with a thread for each CUDA thread: what TileLang made of layouts and barriers.

kdagen.simulate executes the program before TileLang lowers it. This sees what comes out, of decode kernels: no tensor
cores, no asynchronous copies.
"""

import ctypes
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def compiled(lowered, folder: Path):
    """A function of (grid's width, height, tensors and integers by name) that runs a lowered kernel."""
    text = lowered.source[lowered.source.index('extern "C" __global__') :].replace("__restrict__", "")
    text = re.sub(r"extern __shared__ .* buf_dyn_shmem\[\];", "uchar* buf_dyn_shmem = shared_memory;", text)
    declared = re.search(r"\((.*?)\)", text).group(1)
    names = [part.split()[-1].lstrip("*") for part in declared.split(",")]
    run = f"on_grid(width, height, {lowered.threads[0]}, {lowered.shared_bytes}, [=] {{ {lowered.kernel}("
    launch = f'extern "C" void launch(int width, int height, {declared}) {{ {run}{", ".join(names)}); }}); }}'
    source = folder / f"{lowered.kernel}.cpp"
    source.write_text(f'#include "cuda_threads.h"\n{text}\n{launch}\n')
    library = source.with_suffix(".so")
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-pthread", f"-I{HERE}"]
    subprocess.run(["g++", *flags, "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).launch

    def call(width: int, height: int, given: dict) -> None:
        values = (given[name] for name in names)
        passed = [ctypes.c_int(x) if isinstance(x, int) else ctypes.c_void_p(x.data_ptr()) for x in values]
        function(ctypes.c_int(width), ctypes.c_int(height), *passed)

    return call
