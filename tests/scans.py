"""The scans of an op in training by themselves, lowered and generated: index, prepare, scan, replay, reverse."""

from kdagen.autotune.defaults import default_training_schedule

from kdagen.codegen.tilelang import render
from kdagen.derive.adjoint import adjoint
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.ir.tile import verify
from kdagen.lower.prepare import argument_buffers, lower_prepare
from kdagen.lower.reverse import lower_reverse
from kdagen.lower.rows import lower_index
from kdagen.lower.scan import lower_replay, lower_scan
from kdagen.lower.workspace import Workspace
from kdagen.pipeline import argument_dtypes
from kdagen.target import target


def training_scans(recurrence, head_dim=64, arch="sm90", dtype="bfloat16", **choices):
    """(schedule, kernels by what they are)."""
    k, v = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
    dims, form = {"K": k, "V": v}, canonical(recurrence)
    program = chunk_form(form)
    schedule = default_training_schedule(form, dims, dtype, target(arch), **choices)
    workspace = Workspace(program, schedule.chunk_size, dims, dtype)
    dtypes = argument_dtypes(form, dtype, dtype)
    given = workspace, schedule, argument_buffers(form, dims, dtypes)
    return schedule, {
        "index": verify(lower_index(form.name, schedule.chunk_size, schedule.segment)),
        "prepare": verify(lower_prepare(program, workspace, schedule, dtypes)),
        "scan": verify(lower_scan(program, *given, keep_states=True)),
        "replay": verify(lower_replay(program, *given)),
        "reverse": verify(lower_reverse(adjoint(program), *given)),
    }


def generated(recurrence, *args, **choices):
    """(schedule, their TileLang modules by what they are)."""
    schedule, kernels = training_scans(recurrence, *args, **choices)
    return schedule, {name: render(kernel) for name, kernel in kernels.items()}
