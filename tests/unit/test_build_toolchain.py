"""Where compilers are looked for, and how what they print is read."""

import pytest

from kdagen.build import toolchain

PTXAS = """\
common.h(621): warning #1444-D: type "longlong4" was declared deprecated
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kda_scan_kernel' for 'sm_90a'
ptxas info    : Function properties for kda_scan_kernel
    24 bytes stack frame, 32 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 24 bytes cumulative stack size, 1040 bytes smem
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x
"""
LISTING = """\
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0030*/              @UP1 UTMALDG.4D [UR8], [UR4] ;
        /*1040*/                   STL [R1], R2 ;
        /*1050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
"""


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with no compiler: empty PATH, no CUDA_HOME, no wheels."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for variable in ("CUDA_HOME", "CUDA_PATH", "CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toolchain, "_wheel_folders", list)
    toolchain.find_nvcc.cache_clear()
    yield monkeypatch
    toolchain.find_nvcc.cache_clear()


def program(path, prints=""):
    """An executable at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{prints}'\n")
    path.chmod(0o755)
    return path


def nvcc(folder, version):
    return program(folder / "bin" / "nvcc", f"Cuda compilation tools, release 13.0, V{version}")


def test_nvcc_is_looked_for_on_path_then_cuda_home_then_cuda_path_then_in_the_wheels(bare, tmp_path):
    found = []
    bare.setattr(toolchain, "_wheel_folders", lambda: [tmp_path / "wheel"])
    nvcc(tmp_path / "wheel", "13.0.1")
    for origin, version in (("CUDA_PATH", "13.0.2"), ("CUDA_HOME", "13.0.3"), ("PATH", "13.0.4")):
        found.append(toolchain.find_nvcc())
        toolchain.find_nvcc.cache_clear()
        folder = nvcc(tmp_path / origin, version).parent
        bare.setenv(origin, str(folder if origin == "PATH" else folder.parent))
    found.append(toolchain.find_nvcc())
    assert [(f.origin, f.version) for f in found] == [
        ("kdagen[cuda]", "13.0.1"),
        ("CUDA_PATH", "13.0.2"),
        ("CUDA_HOME", "13.0.3"),
        ("PATH", "13.0.4"),
    ]


def test_an_nvcc_that_does_not_run_is_passed_over(bare, tmp_path):
    program(tmp_path / "broken" / "nvcc", "cannot open shared object file")
    bare.setenv("PATH", str(tmp_path / "broken"))
    bare.setenv("CUDA_HOME", str(nvcc(tmp_path / "good", "13.0.5").parent.parent))
    assert toolchain.find_nvcc().version == "13.0.5"


def test_the_wheels_lie_in_site_packages():
    for folder in toolchain._wheel_folders():
        assert folder.name == "cu13" and folder.parent.name == "nvidia"


def test_cc_may_name_a_compiler_with_options(bare, tmp_path):
    bare.setenv("PATH", str(program(tmp_path / "bin" / "mycc").parent))
    bare.setenv("CC", "mycc -m64")
    assert toolchain.find_cc() == [str(tmp_path / "bin" / "mycc"), "-m64"]


def test_ptxas_is_read():
    assert toolchain.ptxas_report(PTXAS) == {
        "registers": 168,
        "spill_stores": 32,
        "spill_loads": 40,
        "stack_bytes": 24,
        "static_shared_bytes": 1040,
        "warnings": [PTXAS.splitlines()[-1]],
    }


def test_ptxas_with_nothing_to_say_of_shared_memory():
    assert toolchain.ptxas_report("ptxas info    : Used 30 registers, used 1 barriers")["static_shared_bytes"] == 0


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("note: a\nx.cu(3): error: identifier y is undefined\nmore", "x.cu(3): error: identifier y is undefined"),
        ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal   : Unsupported gpu architecture"),
        ("gcc: No such file or directory\nnvcc fatal   : Failed", "gcc: No such file or directory"),
        ("killed", "killed"),
        ("", "it printed nothing"),
    ],
)
def test_the_first_error_of_a_log(log, line):
    assert toolchain.first_error(log) == line


def test_sass_is_counted_without_predicates_and_modifiers():
    counts = toolchain.count_opcodes(LISTING)
    assert {name: n for name, n in counts.items() if n} == {"HGMMA": 2, "HMMA": 1, "UTMALDG": 1, "STL": 1}


def test_without_a_disassembler_nothing_is_claimed(bare, tmp_path):
    assert not toolchain.has_disassembler()
    assert toolchain.sass_counts(tmp_path / "x.cubin") is None
