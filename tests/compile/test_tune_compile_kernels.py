"""KDA's own candidates for sm90 through TileLang and nvcc: figures of each rung, loading elsewhere, a second run."""

import subprocess
import sys

import pytest
from fake_compiler import Said
from kdagen.autotune.compile import compile_candidates, load, source_of
from kdagen.autotune.distribute import Compiler
from kdagen.autotune.folder import Folder
from kdagen.autotune.space import space_of
from kdagen.autotune.sweep import Candidate, Study, Sweep, Task, Workload

from kdagen import debug
from kdagen.build import pool
from kdagen.build.builder import job_key, jobs_of
from kdagen.build.cache import Cache
from kdagen.errors import ArtefactError
from kdagen.target import target

pytestmark = pytest.mark.nvcc
TASK = Task("kda", "inference", "sm90", "H100", head_dim=(64, 64))
DEFAULT = Candidate(TASK, space_of(TASK).default)
STAGES = Candidate(TASK, DEFAULT.schedule.replace(stages=3))
TOO_MANY = Candidate(TASK, DEFAULT.schedule.replace(stages=26))  # each of 9 KiB
ALL = [DEFAULT, STAGES, TOO_MANY]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder, and the stages of each kernel that was compiled, by key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDAGEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        study = Study(TASK, (Workload.parse("1x8192x64"),))
        folder = Folder.create(tmp_path_factory.mktemp("sweep"), Sweep((study,)))
        folder.log.append(TASK.name, DEFAULT.id, "model", "kept", schedule=DEFAULT.schedule.fields(), default=True)
        yield folder, compile_all(folder)


def compile_all(folder) -> dict[str, list[str]]:
    stages: dict[str, list[str]] = {}

    def heard(*args):
        for event in pool.compile_each(*args):
            stages.setdefault(event.key, []).append(event.stage)
            yield event

    compile_candidates(folder, 2, None, Said(), todo=lambda *_: ALL, compile_each=heard)
    return stages


def lines(folder, candidate) -> dict[str, dict]:
    return {v["rung"]: v for v in folder.log if v["candidate"] == candidate.id}


def test_candidates_climb_all_rungs(compiled):
    folder, stages = compiled
    for candidate in (DEFAULT, STAGES):
        found = lines(folder, candidate)
        assert [found[rung]["verdict"] for rung in ("lowered", "ptxas", "identical")] == ["kept"] * 3
        lowered, ptxas = found["lowered"]["kernels"], found["ptxas"]["kernels"]
        assert [lowered[k]["threads"] for k in ("kda_index", "kda_prepare", "kda_scan")] == [128, 64, 256]
        assert all(k["spills"] == 0 and 0 < k["registers"] <= 255 for k in ptxas.values())
        assert found["identical"]["kernels_hash"] == folder.manifest(candidate.id)["digest"]
    a, b = (lines(folder, c)["lowered"]["kernels"]["kda_scan"]["shared_bytes"] for c in (DEFAULT, STAGES))
    assert b - a > 8192  # a stage
    assert len(stages) == 5 and len(list(folder.kernels.iterdir())) == 4  # index and prepare are shared


def test_too_much_shared_memory_is_known_before_nvcc(compiled):
    folder, stages = compiled
    found = lines(folder, TOO_MANY)
    assert set(found) == {"lowered"}
    line = found["lowered"]
    assert line["verdict"] == "rejected" and line["kernels"]["kda_scan"]["shared_bytes"] > target("sm90").shared_bytes
    assert (
        line["reason"].startswith("kda_scan needs ")
        and "KiB of shared memory a block, sm90 (H100, H200) has 227 K" in line["reason"]
    )
    assert stages.pop(line["key"]) == ["lowering", "lowered", "failed"]
    assert all(s == ["lowering", "lowered", "nvcc", "launcher", "done"] for s in stages.values())


def test_a_second_run_compiles_nothing(compiled):
    folder, _ = compiled
    before = list(folder.log)
    assert compile_all(folder) == {} and list(folder.log) == before


def test_kernels_load_with_torch_and_tvm_ffi_only(compiled, tmp_path):
    """In a process with an empty PATH, in which neither TileLang nor sympy can be imported."""
    folder, _ = compiled
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "tilelang tvm sympy jinja2".split():
            raise ImportError("not on this machine: " + name)
sys.meta_path.insert(0, Refuse())
from kdagen.autotune.compile import load
from kdagen.autotune.folder import Folder
print(sorted(load(Folder({str(folder.path)!r}), {STAGES.id!r}).functions()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert run.stdout == "['kda_index', 'kda_prepare', 'kda_scan']\n", run.stderr


def test_a_flipped_byte_is_refused_and_mended(compiled):
    folder, _ = compiled
    found = load(folder, STAGES.id)
    library = found.folder / found.manifest["kernels"][2]["library"]
    code = bytearray(library.read_bytes())
    code[len(code) // 2] ^= 1
    library.write_bytes(code)
    with pytest.raises(ArtefactError, match="kda_scan.so is corrupt or was edited"):
        load(folder, STAGES.id)
    assert load(folder, DEFAULT.id)  # whose scan is another
    assert compile_all(folder) == {} and load(folder, STAGES.id)


def test_an_actor_s_compiler_gives_the_entry_as_it_is_in_the_cache(compiled):
    """As a host of a Ray cluster does it (here from this cache); a worker that died is replaced."""
    job = jobs_of(source_of(DEFAULT))[0]
    key, compiler = job_key(job), Compiler()
    stages, files, error = compiler.run(key, job, 60)
    entry = Cache(debug.cache_dir()).get(key)
    assert (stages, error) == ([], None)
    assert {**files, "sha256.json": (entry / "sha256.json").read_bytes()} == {
        f.name: f.read_bytes() for f in entry.iterdir()
    }
    compiler.worker.end()
    assert compiler.run(key, job, 60)[2] is None
    compiler.worker.end()
