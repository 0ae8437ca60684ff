"""What an illegal CPU schedule says, and what forward and backward by two schedules say."""

import re

import pytest
import torch

import kdagen as kg
from kdagen.errors import ArgumentError, ScheduleError
from kdagen.runtime.cpu_schedule import pinned
from kdagen.schedule import CpuSchedule


@pytest.mark.parametrize(
    "choices, said", [({"rows": 48}, "rows = 48"), ({"span": 0, "threads": -1}, "span = 0, threads = -1")]
)
def test_illegal_choices(choices, said):
    rest = "expected rows among 16, 32, 64, 128, span from 1 on, and threads from 1 on or 0 for all"
    with pytest.raises(ScheduleError, match=f"^{re.escape(f'{said}: {rest}')}$"):
        CpuSchedule().replace(**choices)


def test_a_backward_by_another_schedule_than_its_forward():
    x = torch.ones(1, 100, 1, 4, requires_grad=True)
    with pinned(CpuSchedule(rows=16)):
        o, _ = kg.compile("linear_attention")(x, x, x)
    said = "linear_attention: the forward kept 7 states, expected 1 with rows = 128: run forward and backward by one"
    with pytest.raises(ArgumentError, match=re.escape(said)), pinned(CpuSchedule(rows=128)):
        o.sum().backward()
