"""Simulates the worst case of programmatic dependent launch on a CPU.

Each kernel of a graph runs up to its wait before the earlier kernels run. A kernel that never waits runs to
its end; a kernel that waits for it does not wait for the kernels before it, so those run last. As on a GPU,
any other operation begins after the previous one has ended, and the next one begins after it has ended.
Kernels run in Triton's interpreter; nothing overlaps within a kernel.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
import triton.language as tl
from replay import Done, recorded
from triton.runtime import interpreter

from benchmarks import timing
from paligemma.kernels import common

# The waits of the kernels that are running. Each of these kernels runs within the kernel that waits for it.
_waits: list[Callable[[], None]] = []


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make benchmarks.timing capture graphs of this module, and make launches dependent as on such a GPU."""
    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(common, "architecture", lambda: 90)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: _waits[-1]() if _waits else None)
    monkeypatch.setattr(tl.extra.cuda, "globaltimer", count(step=1 << 30).__next__)


def captured(work: Callable[[], Any], warm_up: Callable[[], Any]) -> tuple["Graph", Any]:
    """Replaces benchmarks.timing.captured: the graph of work(), and what work() returned."""
    done, result = recorded(work)
    return Graph([operation for operation in done if not operation.allocates]), result


class Graph:
    def __init__(self, done: list[Done]):
        self.done = done

    def replay(self) -> None:
        started = [False] * len(self.done)

        def run(i: int) -> None:
            if i < 0 or started[i]:
                return
            started[i] = True
            if not self.done[i].dependent or (i and not self.done[i - 1].dependent):
                run(i - 1)
            if not self.done[i].dependent:
                self.done[i].again()
                return
            builder = interpreter.interpreter_builder
            place = builder.grid_dim, builder.grid_idx
            _waits.append(lambda: run(i - 1))
            try:
                self.done[i].again()
            finally:
                _waits.pop()
                builder.grid_dim, builder.grid_idx = place

        for i in reversed(range(len(self.done))):
            run(i)
