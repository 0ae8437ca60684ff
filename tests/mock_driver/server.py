"""Runs in a process of its own, where libcuda.so.1 is the mock: loads launchers and calls them as the test asks.

One JSON request a line on stdin, one JSON reply a line on stdout. A process of its own, because a process can hold
only one libcuda.so.1, and on a machine with a GPU that is the real one.
"""

import ctypes
import json
import sys
import threading

import tvm_ffi

CODES = {"bfloat16": (4, 16), "float16": (2, 16), "float32": (2, 32), "int32": (0, 32), "int64": (0, 64)}
CUDA = 2


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int),
        ("dtype", DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype = ctypes.py_object
capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_alive = []  # a capsule does not own what it points to


class FakeTensor:
    """A DLPack tensor that claims to lie on a GPU; its address is never read."""

    def __init__(self, shape, dtype, device=0, address=0x7F0000000000, strides=None, device_type=CUDA):
        n = len(shape)
        if strides is None:
            strides = [1] * n
            for i in range(n - 2, -1, -1):
                strides[i] = strides[i + 1] * shape[i + 1]
        sizes, steps = (ctypes.c_int64 * n)(*shape), (ctypes.c_int64 * n)(*strides)
        as_pointer = lambda array: ctypes.cast(array, ctypes.POINTER(ctypes.c_int64))  # noqa: E731
        code, bits = CODES[dtype]
        self.where = (device_type, device)
        tensor = DLTensor(
            address, Device(*self.where), n, DType(code, bits, 1), as_pointer(sizes), as_pointer(steps), 0
        )
        self.managed = Managed(tensor, None, None)
        _alive.append((sizes, steps, self.managed))

    def __dlpack_device__(self):
        return self.where

    def __dlpack__(self, **_):
        return capsule(ctypes.addressof(self.managed), b"dltensor", None)


def call(library: str, function: str, tensors: list, threads: int = 1) -> dict:
    """Calls the launcher once in each of `threads` threads that start together; the last error wins."""
    kernel = tvm_ffi.load_module(library)[function]
    arguments = [tvm_ffi.from_dlpack(FakeTensor(**t)) if isinstance(t, dict) else t for t in tensors]
    barrier, errors = threading.Barrier(threads), []

    def run():
        barrier.wait()
        try:
            kernel(*arguments)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"errors": errors}


def main(mock: str) -> None:
    if mock:  # from here on, dlopen("libcuda.so.1") finds the mock by its soname
        driver = ctypes.CDLL(mock, mode=ctypes.RTLD_GLOBAL)
        driver.mock_log.restype = ctypes.c_char_p
    for line in sys.stdin:
        request = json.loads(line)
        reply = {"log": []}
        if mock:
            driver.mock_reset()
            driver.mock_capability(*request.pop("capability", (9, 0)))
            driver.mock_scalars(*request.pop("scalars", (0, 0)))
            if fail := request.pop("fail", None):
                driver.mock_fail(fail[0].encode(), fail[1])
        reply |= call(**request)
        if mock:
            reply["log"] = driver.mock_log().decode().splitlines()
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
