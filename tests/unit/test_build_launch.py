"""The host launcher, compiled and called on a mock driver: what it checks, and what it asks of the driver how often."""

import itertools
import re
import shutil

import mock_driver
import pytest
from mock_driver import tensor

from kdagen.build import toolchain
from kdagen.build.adapter import Descriptor, Lowered, Parameter, Scalar, Tensor
from kdagen.build.launcher import launcher_source
from kdagen.errors import ToolchainError
from kdagen.target import target

B, T, H, NC = 2, 37, 3, 3
SHARED = 60 * 1024  # more than the 48 KiB that need no leave
LABELS = ("g", "w", "o", "rows", "every")
copies = itertools.count()


ARGUMENTS = (
    Tensor("x_in", "bfloat16", ("B", "T", "H", "64")),
    Tensor("g", "float32", ("B", "T", "H")),
    Tensor("w", "float16", ("NC", "64")),
    Tensor("o", "float32", ("B * H", "64")),
    Tensor("rows", "int32", ("NC", "2")),
    Scalar("every", "int32"),
)


def lowered(**changes) -> Lowered:
    """What lowering says of a kernel: x by TMA, the others by pointer, o = [B*H, 64], an integer by value."""
    taken = (("g", "tensor"), ("o", "tensor"), ("x_desc", "descriptor"), ("B", "scalar"), ("T", "scalar"))
    fields = dict(
        kernel="toy_kernel",
        source="",
        arguments=ARGUMENTS,
        symbols=("B", "T", "H", "NC"),
        parameters=tuple(Parameter(name, kind, "int32_t") for name, kind in (*taken, ("every", "scalar"))),
        descriptors=(
            Descriptor(
                name="x_desc",
                base="x_in",
                dtype=9,
                extents=("64", "H", "T", "B"),
                strides=("2", "128", "(int64_t)H * 128", "(int64_t)(H * T) * 128"),
                box=("64", "1", "16", "1"),
                element_strides=("1", "1", "1", "1"),
                modes=(0, 3, 2, 0),
            ),
        ),
        grid=("NC", "H", "B"),
        threads=("256", "1", "1"),
        shared_bytes=SHARED,
        device_module=None,
        host_module=None,
    )
    return Lowered(**{**fields, **changes})


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A launcher around bytes that only the mock takes for a cubin."""
    folder = tmp_path_factory.mktemp("launcher")
    (folder / "toy.cubin").write_bytes(b"notacubin")
    source = folder / "toy.c"
    source.write_text(launcher_source("toy", lowered(), target("sm90"), "toy.cubin", ["x", *LABELS]))
    return toolchain.compile_library(source)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    process = mock_driver.MockProcess(mock_driver.compile_mock(tmp_path_factory.mktemp("mock")))
    yield process
    process.close()


@pytest.fixture
def fresh(library, tmp_path):
    """The launcher as a library that was never used: its own copy of all static state."""
    return shutil.copy(library, tmp_path / f"fresh{next(copies)}.so")


def arguments(**changes) -> list:
    """The tensors and the integer of a legal call, some changed."""
    device = changes.pop("device", 0)
    legal = {
        "x": tensor((B, T, H, 64), "bfloat16", device=device),
        "g": tensor((B, T, H), "float32", device=device),
        "w": tensor((NC, 64), "float16", device=device),
        "o": tensor((B * H, 64), "float32", device=device),
        "rows": tensor((NC, 2), "int32", device=device),
        "every": -7,
    }
    return list({**legal, **changes}.values())


def calls(reply: dict, name: str) -> list[str]:
    return [line for line in reply["log"] if line.startswith(name)]


def test_a_launch_asks_the_driver_for_what_the_kernel_needs(driver, fresh):
    reply = driver.call(fresh, "toy", arguments(), scalars=(3, 3))
    assert reply["errors"] == []
    assert [line.split()[0] for line in reply["log"] if line != "cuInit"] == [
        "cuLibraryLoadData",
        "cuLibraryGetKernel",
        "cuKernelSetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuTensorMapEncodeTiled",
        "cuLaunchKernel",
    ]
    assert calls(reply, "cuLibraryLoadData") == ["cuLibraryLoadData image=notacubi aligned=1"]
    assert calls(reply, "cuLibraryGetKernel") == ["cuLibraryGetKernel toy_kernel"]
    assert calls(reply, "cuKernelSetAttribute") == [
        f"cuKernelSetAttribute toy_kernel attribute=8 value={SHARED} device=0"
    ]
    assert calls(reply, "cuTensorMapEncodeTiled") == [
        f"cuTensorMapEncodeTiled dtype=9 address=0x7f0000000000 extents=64,{H},{T},{B} "
        f"strides=128,{H * 128},{H * T * 128} box=64,1,16,1 modes=0,3,2,0"
    ]
    assert calls(reply, "cuLaunchKernel") == [
        f"cuLaunchKernel toy_kernel grid={NC},{H},{B} block=256,1,1 shared={SHARED} stream=(nil) context=1 "
        f"scalars={B},{T},{2**32 - 7}"  # the log's integers have no sign
    ]


def test_a_second_launch_only_encodes_and_launches(driver, fresh):
    driver.call(fresh, "toy", arguments())
    names = [line.split()[0] for line in driver.call(fresh, "toy", arguments())["log"]]
    assert names == ["cuTensorMapEncodeTiled", "cuLaunchKernel"]


def test_each_device_has_its_context_and_shares_the_library(driver, fresh):
    driver.call(fresh, "toy", arguments())
    reply = driver.call(fresh, "toy", arguments(device=1))
    assert reply["errors"] == []
    assert not calls(reply, "cuLibraryLoadData")
    assert calls(reply, "cuDevicePrimaryCtxRetain") == ["cuDevicePrimaryCtxRetain device=1"]
    assert calls(reply, "cuKernelSetAttribute")[0].endswith("device=1")
    assert "context=2" in calls(reply, "cuLaunchKernel")[0]


def test_threads_that_meet_at_the_first_use_load_once(driver, fresh):
    reply = driver.call(fresh, "toy", arguments(), threads=8)
    assert reply["errors"] == []
    assert len(calls(reply, "cuLibraryLoadData")) == len(calls(reply, "cuDevicePrimaryCtxRetain")) == 1
    assert len(calls(reply, "cuLaunchKernel")) == 8


def test_an_empty_grid_is_no_launch(driver, fresh):
    empty = {
        "x": tensor((0, T, H, 64), "bfloat16"),
        "g": tensor((0, T, H), "float32"),
        "o": tensor((0, 64), "float32"),
    }
    assert driver.call(fresh, "toy", arguments(**empty)) == {"errors": [], "log": []}


def test_what_is_copied_of_an_empty_tensor_needs_no_descriptor(driver, library):
    no_token = {"x": tensor((B, 0, H, 64), "bfloat16"), "g": tensor((B, 0, H), "float32")}
    reply = driver.call(library, "toy", arguments(**no_token))
    assert reply["errors"] == [] and not calls(reply, "cuTensorMapEncodeTiled")
    assert len(calls(reply, "cuLaunchKernel")) == 1


def test_a_dimension_of_size_one_may_have_any_stride(driver, library):
    g = tensor((1, T, 1), "float32", strides=[999, 1, 77])
    one = {"x": tensor((1, T, 1, 64), "bfloat16"), "g": g, "o": tensor((1, 64), "float32")}
    assert driver.call(library, "toy", arguments(**one))["errors"] == []


REFUSED = {
    "number": (None, "TypeError: toy: takes 6 arguments, got 3"),
    "not an integer": ({"every": tensor((1,), "int32")}, "TypeError: toy: argument every (number 5) must be an int"),
    "wide integer": (
        {"every": 2**31},
        "ValueError: toy: every = 2147483648 is out of range: expected -2147483648 to 2147483647",
    ),
    "int64": ({"rows": tensor((NC, 2), "int64")}, "ValueError: toy: rows is int64, expected int32"),
    "not a tensor": ({"g": 7}, "TypeError: toy: argument g (number 1) must be a tensor"),
    "cpu": (
        {"g": tensor((B, T, H), "float32", device_type=1)},
        "ValueError: toy: g is not on a CUDA device (DLPack device type 1): call g.cuda()",
    ),
    "devices": (
        {"w": tensor((NC, 64), "float16", device=1)},
        "ValueError: toy: x is on cuda:0 and w on cuda:1: expected one device",
    ),
    "dtype": (
        {"x": tensor((B, T, H, 64), "float16")},
        "ValueError: toy: x is float16, expected bfloat16",
    ),
    "rank": (
        {"g": tensor((B, T), "float32")},
        "ValueError: toy: g has 2 dimensions, expected [B, T, H]",
    ),
    "symbol": (
        {"g": tensor((B, T + 1, H), "float32")},
        "ValueError: toy: g has shape [2, 38, 3], expected [B, T, H] = [2, 37, 3]",
    ),
    "number in shape": (
        {"x": tensor((B, T, H, 32), "bfloat16")},
        "ValueError: toy: x has shape [2, 37, 3, 32], expected [B, T, H, 64] = [2, 37, 3, 64]",
    ),
    "expression": (
        {"o": tensor((5, 64), "float32")},
        "ValueError: toy: o has shape [5, 64], expected [B * H, 64] = [6, 64]",
    ),
    "contiguity": (
        {"g": tensor((B, T, H), "float32", strides=[T * H, 1, T])},
        "ValueError: toy: g is not contiguous (stride 37 in dimension 2, expected 1): call g.contiguous()",
    ),
    "alignment": (
        {"x": tensor((B, T, H, 64), "bfloat16", address=0x7F0000000008)},
        "ValueError: toy: x starts at an address that is not a multiple of 16 bytes: pass x.clone()",
    ),
    "32 bits": (
        {"x": tensor((1, 2**31, 1, 64), "bfloat16"), "g": tensor((1, 2**31, 1), "float32")},
        "ValueError: toy: T = 2147483648 is out of range: expected 0 to 2147483647",
    ),
    "grid": (
        {
            "x": tensor((70000, 1, 1, 64), "bfloat16"),
            "g": tensor((70000, 1, 1), "float32"),
            "o": tensor((70000, 64), "float32"),
        },
        "ValueError: toy: needs 70000 blocks in grid dimension z, the GPU allows 65535: "
        "pass fewer sequences or heads a call",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_are_refused(driver, library, case):
    changes, message = REFUSED[case]
    reply = driver.call(library, "toy", arguments()[:3] if changes is None else arguments(**changes))
    assert reply["errors"] == [message]
    assert not calls(reply, "cuLaunchKernel")


FAILURES = {
    "cuLibraryLoadData": "cuLibraryLoadData failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "cuLibraryGetKernel": "cuLibraryGetKernel failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "cuKernelSetAttribute": "cuKernelSetAttribute failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRetain failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "cuDeviceGetAttribute": "cuDeviceGetAttribute failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "cuCtxPushCurrent_v2": "cuCtxPushCurrent_v2 failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "cuTensorMapEncodeTiled": "cuTensorMapEncodeTiled failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "cuLaunchKernel": "cuLaunchKernel failed with CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
}


@pytest.mark.parametrize("call", FAILURES)
def test_a_driver_that_fails_is_reported_and_asked_again(driver, fresh, call):
    reply = driver.call(fresh, "toy", arguments(), fail=(call, 2))
    assert reply["errors"] == [f"RuntimeError: toy: {FAILURES[call]}"]
    again = driver.call(fresh, "toy", arguments())
    assert again["errors"] == []
    assert len(calls(again, "cuLaunchKernel")) == 1


def test_another_gpu_is_refused_with_what_to_build(driver, fresh):
    reply = driver.call(fresh, "toy", arguments(), capability=(8, 0))
    assert reply["errors"] == [
        "RuntimeError: toy: built for sm90, but cuda:0 has compute capability 8.0: "
        "build for that GPU with `kdagen build --arch`"
    ]


def no_driver(tmp_path, monkeypatch, write) -> mock_driver.MockProcess:
    """A process whose libcuda.so.1 is what `write(path)` leaves."""
    write(tmp_path / "libcuda.so.1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    return mock_driver.MockProcess(None)


def test_no_driver_at_all(library, tmp_path, monkeypatch):
    process = no_driver(tmp_path, monkeypatch, lambda path: path.write_bytes(b"not a library"))
    (error,) = process.call(library, "toy", arguments())["errors"]
    process.close()
    assert error.startswith("RuntimeError: toy: cannot open libcuda.so.1: is an NVIDIA driver installed? (")


def test_a_driver_that_is_too_old(library, tmp_path, monkeypatch):
    def old(path):
        toolchain.subprocess.run(["cc", "-shared", "-o", str(path), "-x", "c", "/dev/null"], check=True)

    process = no_driver(tmp_path, monkeypatch, old)
    (error,) = process.call(library, "toy", arguments())["errors"]
    process.close()
    assert error == "RuntimeError: toy: the NVIDIA driver has no cuInit: update it to one of CUDA 12.0 or later"


def test_a_dimension_that_no_tensor_shows_is_refused():
    with pytest.raises(ToolchainError, match=re.escape("toy: no tensor has a dimension that is just NC")):
        launcher_source("toy", lowered(arguments=ARGUMENTS[:2]), target("sm90"), "toy.cubin")
