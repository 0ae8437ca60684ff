"""Every message of the simulators and of the adapter to TileLang."""

import ml_dtypes
import numpy as np
import pytest
import torch
from toy import PREPARE, toy

from kdagen.build import adapter
from kdagen.errors import ArgumentError, SimulationError, ToolchainError
from kdagen.simulate.program import Simulator
from kdagen.simulate.run import simulate
from kdagen.simulate.schedule import RaceSimulator
from kdagen.target import target

SM90 = target("sm90")
ONE = 'A: T.Tensor((64,), "float32"), B: T.Tensor((64,), "float32")'
MODULE = """
import tilelang.language as T

def kernel():
    @T.prim_func
    def kernel({params}):
        with T.Kernel(1, threads={threads}) as x:
            {body}
    return kernel
"""


def traced(body, params=ONE, threads=128):
    text = MODULE.format(params=params, body=body.replace("\n", "\n            "), threads=threads)
    return adapter.trace(text, "kernel", "<errors>")


def refused(body, *arrays, params=ONE, threads=128, race=False):
    with pytest.raises(SimulationError) as caught:
        kernel = traced(body, params, threads)
        simulator = RaceSimulator(adapter.specialised(kernel, SM90)) if race else Simulator(kernel)
        simulator(*(arrays or (np.zeros(64, np.float32), np.zeros(64, np.float32))))
    return str(caught.value)


def test_an_unknown_function_is_named_with_its_line():
    assert refused('B[0] = T.call_extern("float32", "foo", A[0])') == (
        "kernel 'kernel': the simulator has no function tirx.call_extern, found at <errors>:8: "
        'B[0] = T.call_extern("float32", "foo", A[0]): write it with constructs that kdagen/simulate knows'
    )


def test_an_unknown_operation_is_named_with_its_line():
    message = refused('B[0] = A[0]\nT.evaluate(T.call_extern("int32", "foo"))')
    assert "the simulator has no operation tirx.call_extern, found at <errors>:9: T.evaluate(" in message


def test_an_unknown_statement_is_named_with_its_line():
    body = "for i in T.Parallel(8):\n    B[i] = 0.0\n    for j in T.Parallel(8): B[j] = 1.0"
    assert "the simulator has no T.Parallel inside T.Parallel with statements between them" in refused(body)


def test_a_reduction_without_a_meaning_here():
    body = "s, r = T.alloc_fragment((8, 8), 'int32'), T.alloc_fragment((8,), 'int32')\nT.reduce_bitand(s, r, dim=1)"
    assert "the simulator has no reduction bitand" in refused(body)


def test_a_fill_of_each_lane():
    body = "l = T.alloc_local((4,), 'float32')\nfor i in T.Parallel(8):\n    T.clear(l)\n    l[0] = A[i]"
    assert "the simulator has no T.fill of a thread's own array inside T.Parallel" in refused(body)


def test_a_thread_index_has_no_value_in_program_order():
    assert "kernel 'kernel': 'tx' has no value here" in refused("B[0] = T.cast(T.get_thread_binding(), 'float32')")


def test_a_break_out_of_lanes():
    body = "for i in T.Parallel(8):\n    for j in T.serial(4):\n        B[i] = A[j]\n        T.loop_break()"
    assert refused(body) == "T.loop_break inside T.Parallel: expected it in a serial loop over scalars"


def test_a_copy_between_boxes_of_other_shapes():
    body = "s = T.alloc_shared((64,), 'float32')\nT.copy(A[0:32], s[0:64])"
    assert refused(body) == "copy of 'A', box [32], to 's', box [64]: expected one shape"


def test_the_thread_index_outside_role_tests():
    body = "tx = T.get_thread_binding()\nif tx % 2 == 0:\n    B[0] = A[0]"
    message = refused(body, race=True)
    assert "the simulator has no use of threadIdx.x other than 'threadIdx.x < constant'" in message


def test_a_barrier_of_all_threads_between_roles():
    body = "tx = T.get_thread_binding()\nif tx < 128:\n    B[0] = A[0]\nT.sync_threads()"
    assert "the simulator has no T.sync_threads between warp roles" in refused(body, threads=256, race=True)


def test_an_operation_that_no_role_may_use():
    body = "T.fence_proxy_async()\nT.ptx_commit_group()"
    message = refused(body, race=True)
    assert "the simulator has no operation" in message
    assert "in a warp-specialised program" in message


def arguments(*arrays, params=ONE):
    with pytest.raises(ArgumentError) as caught:
        Simulator(traced("B[0] = A[0]", params))(*arrays)
    return str(caught.value)


def test_a_wrong_number_of_arguments():
    assert arguments(np.zeros(64, np.float32)) == "kernel 'kernel': 1 arguments given, expected 2"


def test_an_argument_of_another_dtype_or_rank():
    message = "kernel 'kernel': 'A' is a bfloat16 array of 1 dims, expected a float32 array of 1 dims"
    assert arguments(np.zeros(64, ml_dtypes.bfloat16), np.zeros(64, np.float32)) == message
    message = "kernel 'kernel': 'B' is a list, expected a float32 array of 1 dims"
    assert arguments(np.zeros(64, np.float32), [0.0]) == message


def test_an_argument_of_another_size():
    message = "kernel 'kernel': B.shape[0] is 32, expected 64"
    assert arguments(np.zeros(64, np.float32), np.zeros(32, np.float32)) == message


def toy_inputs(**changes):
    return {"x": torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16), "g": torch.zeros(1, 16, 2), **changes}


def test_tensors_missing_or_unknown():
    with pytest.raises(ArgumentError) as caught:
        simulate(toy(), {"x": torch.zeros(1)})
    assert str(caught.value) == "toy: got tensors x; expected g, x"


def test_a_tensor_of_another_dtype_is_not_converted():
    with pytest.raises(ArgumentError) as caught:
        simulate(toy(), toy_inputs(x=torch.zeros(1, 16, 2, 64)))
    assert str(caught.value) == (
        "toy: 'x' is torch.float32 on cpu, expected torch.bfloat16 on cpu: convert it with x.to('cpu', torch.bfloat16)"
    )


def test_tensors_whose_shapes_disagree():
    with pytest.raises(ArgumentError) as caught:
        simulate(toy(), toy_inputs(g=torch.zeros(1, 17, 2)))
    assert str(caught.value) == (
        "toy: 'g' has shape [1, 17, 2], expected ['B', 'T', 'HV'], of the same B and T as others: [1, 16]"
    )
    with pytest.raises(ArgumentError, match=r"'g' has shape \[2, 8, 2\]"):  # as many tokens, of other sequences
        simulate(toy(), toy_inputs(g=torch.zeros(2, 8, 2)))
    with pytest.raises(ArgumentError, match=r"'x' has shape \[16, 2, 64\], expected \['B', 'T', 'H', 64\]"):
        simulate(toy(), toy_inputs(x=torch.zeros(16, 2, 64, dtype=torch.bfloat16)))


def test_states_whose_shape_disagrees():
    with pytest.raises(ArgumentError) as caught:
        simulate(toy(), toy_inputs(), torch.zeros(2, 2, 16, 64))
    assert str(caught.value) == (
        "toy: 'initial_state' has shape [2, 2, 16, 64], expected ['N', 'HV', 16, 64] = [1, 2, 16, 64]"
    )


def test_an_initial_state_that_the_op_does_not_take():
    op = toy()
    kernels = tuple(k for k in op.kernels if k.family == "prepare")
    with pytest.raises(ArgumentError, match="toy: takes no initial_state"):
        simulate(op.__class__(**{**vars(op), "kernels": kernels}), toy_inputs(), torch.zeros(1))


def test_tracing_says_which_module_failed_in_one_line(monkeypatch):
    monkeypatch.delenv("KDAGEN_DEBUG", raising=False)
    with pytest.raises(ToolchainError) as caught:
        adapter.trace(PREPARE.replace("T.copy", "T.kopy"), "toy_prepare", "<toy>")
    assert str(caught.value) == (
        "tracing toy_prepare in <toy>: module 'tilelang.language' has no attribute 'kopy' "
        "(KDAGEN_DEBUG=1 shows TileLang's trace)"
    )


def test_lowering_hides_the_trace_unless_debugging(monkeypatch):
    body = "a, c = T.alloc_shared((20, 20), 'bfloat16'), T.alloc_fragment((20, 20), 'float32')\nT.gemm(a, a, c)"
    kernel = traced(body)
    monkeypatch.delenv("KDAGEN_DEBUG", raising=False)
    with pytest.raises(ToolchainError) as quiet:
        adapter.lower(kernel, SM90)
    assert str(quiet.value) == (
        "lowering kernel for sm90: Check failed: (M % kMPerWarp == 0) is false: M must be divisible by 16, but got 20 "
        "(KDAGEN_DEBUG=1 shows TileLang's trace)"
    )
    assert quiet.value.__cause__ is None
    monkeypatch.setenv("KDAGEN_DEBUG", "1")
    with pytest.raises(ToolchainError) as loud:
        adapter.lower(kernel, SM90)
    assert loud.value.__cause__ is not None


def test_tilelang_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tilelang", None)
    with pytest.raises(ToolchainError, match=r"pip install 'kdagen\[build\]'"):
        adapter.trace("", "kernel", "<none>")
