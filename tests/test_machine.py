"""What the package finds out about a machine."""

import platform
from pathlib import Path

import pytest

from paligemma import machine


def test_how_fast_memory_is_read(monkeypatch):
    assert 0.5 < machine.read_bandwidth("cpu", 1 << 25) < 5000  # GB/s
    monkeypatch.setattr(machine, "free_memory", lambda: (1 << 26) - 1)
    assert machine.read_bandwidth("cpu", 1 << 25) is None


CPUINFO = """processor\t: 0
model name\t: A CPU: fast @ 3 GHz
flags\t\t: fpu avx2 avx512f
power management:

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(("content", "name", "flags"), [
    pytest.param(CPUINFO, "A CPU: fast @ 3 GHz", ["fpu", "avx2", "avx512f"], id="x86"),
    pytest.param("Features : fp asimd", None, ["fp", "asimd"], id="Arm, whose file has no name"),
])  # fmt: skip
def test_the_name_and_the_instruction_sets_of_a_cpu(monkeypatch, content, name, flags):
    monkeypatch.setattr(Path, "read_text", lambda self: content)
    assert machine.cpu_name() == (name or platform.processor() or platform.machine())
    assert machine.cpu_flags() == flags


def test_a_system_that_says_nothing(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert isinstance(machine.cpu_name(), str)
    assert machine.cpu_flags() == []
