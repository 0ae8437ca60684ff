"""What the CPU as a device refuses."""

import re

import pytest
from kdagen.autotune.devices import cpu
from kdagen.autotune.sweep import Policy, Workload

from kdagen.errors import ArgumentError


def test_one_of_several_cpus():
    said = "device 'cpu:1': expected cpu; which cores it has is the affinity's to say (taskset)"
    with pytest.raises(ArgumentError, match=f"^{re.escape(said)}$"):
        cpu.Device("1")


@pytest.mark.parametrize("policy", ["graph cold", "device warm"])
def test_a_policy_of_gpus(policy):
    said = f"timing policy '{policy}': expected 'eager cold' or 'eager warm' on the CPU"
    with pytest.raises(ArgumentError, match=f"^{re.escape(said)}$"):
        cpu.Device().samplers([], Workload.parse("1x1x1"), Policy.parse(policy))
