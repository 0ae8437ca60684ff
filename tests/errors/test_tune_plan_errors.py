"""What cannot be planned, and what to write instead."""

import pytest
from kdagen.autotune.folder import Folder
from kdagen.autotune.plan import plan, surveyed
from kdagen.autotune.progress import Silent
from kdagen.autotune.space import space_of
from kdagen.autotune.sweep import Study, Sweep, Task, Workload

from kdagen.errors import ArgumentError, ArtefactError, RecurrenceError, ScheduleError

WORKLOADS = (Workload.parse("1x8192x64"),)


def task(**fields):
    return Task(**{"op": "kda", "purpose": "inference", "target": "sm90", "device": "H100", **fields})


def survey(fixed=None, **fields):
    return surveyed(Study(task(**fields), WORKLOADS), fixed or {})


def test_a_device_without_facts():
    expected = "no facts about the device 'Tesla T4', which candidates are judged by: expected one of H100, H200, A100,"
    with pytest.raises(ArgumentError, match=expected):
        survey(device="Tesla T4")


def test_a_device_of_another_target():
    with pytest.raises(ArgumentError, match="the device A100 is of target sm80, not sm90: choose one of them"):
        survey(device="A100")


def test_a_target_that_nothing_is_compiled_for():
    with pytest.raises(ArgumentError, match=r"for MI300X \(gfx942\) kdagen writes sources, which it cannot compile"):
        survey(target="gfx942", device="MI300X")


def test_an_axis_that_is_none():
    expected = (
        "no axis threads in the space of kda for inference on sm90: expected some of chunk_size, decay, prepare_threads"
    )
    with pytest.raises(ArgumentError, match=expected):
        space_of(task()).survey({"threads": 4})
    with pytest.raises(ArgumentError, match="no axis warps in the space of kda for inference on sm90: expected some"):
        survey({"warps": 4, "threads": 4})


@pytest.mark.parametrize("values, said", [(24, "24"), ([16, 24, 48], "24, 48")])
def test_a_value_that_is_not_on_its_axis(values, said):
    with pytest.raises(ArgumentError, match=f"chunk_size {said} is not on its axis: expected some of 16, 32, 64"):
        survey({"chunk_size": values})


def test_head_dims_without_kernels():
    with pytest.raises(ScheduleError, match=r"head_dim \(96, 96\) has no kernels: expected K and V among"):
        survey(head_dim=(96, 96))


def test_a_training_that_has_no_default():
    with pytest.raises(ScheduleError, match="kda has no training kernels for sm120 at head_dim"):
        survey(purpose="training", target="sm120", device="RTX 5090")


def test_an_op_that_is_none():
    with pytest.raises(RecurrenceError, match="no_such_op"):
        survey(op="no_such_op")


def test_a_folder_in_which_someone_else_works(tmp_path):
    folder = Folder.create(tmp_path / "sweep", Sweep((Study(task(), WORKLOADS),)))
    with folder.lock(), pytest.raises(ArtefactError, match="another `kdagen tune` works in"):
        plan(Folder(folder.path), Silent())


def test_nothing_is_written_where_one_of_the_studies_is_refused(tmp_path):
    studies = Study(task(), WORKLOADS), Study(task(device="A100"), WORKLOADS)
    folder = Folder.create(tmp_path / "sweep", Sweep(studies))
    with pytest.raises(ArgumentError):
        plan(folder, Silent())
    assert not folder.log.path.exists()
