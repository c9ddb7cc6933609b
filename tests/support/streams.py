"""Simulates CUDA streams on a CPU: work on a stream runs only when something waits for it.

That is the latest time at which a GPU may run it, so code that reads without waiting reads the old values.
Steps of a generation and operations that write to a tensor are deferred; other operations, such as views, run
at once.
"""

import contextvars
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma import cuda_graph


class Stream:
    def __init__(self):
        self.given: list[Callable[[], object]] = []
        self.done = 0

    def reach(self, n: int) -> None:
        while self.done < n:
            self.done += 1
            self.given[self.done - 1]()

    def synchronize(self) -> None:
        self.reach(len(self.given))

    def record_event(self) -> "Event":
        return Event(self, len(self.given))

    def wait_event(self, event: "Event") -> None:
        self.given.append(event.synchronize)

    def wait_stream(self, other: None) -> None:
        """Wait for the caller's stream, whose work is always done."""


class Event:
    def __init__(self, stream: Stream, n: int):
        self.stream, self.n = stream, n

    def synchronize(self) -> None:
        self.stream.reach(self.n)


class On(TorchDispatchMode):
    """Replaces torch.cuda.stream: within it, operations go to the stream."""

    current: Stream | None = None

    def __init__(self, stream: Stream):
        super().__init__()
        self.stream = stream

    def __enter__(self):
        On.current = self.stream
        return super().__enter__()

    def __exit__(self, *error):
        On.current = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(returned.alias_info and returned.alias_info.is_write for returned in func._schema.returns):
            return func(*args, **(kwargs or {}))
        self.stream.given.append(lambda: func(*args, **(kwargs or {})))
        return args[0]


def install(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Stream, Stream]]:
    """Make generations use these streams. The returned list receives them as they are created."""
    created, run = [], cuda_graph.GraphedStep.run

    def streams(device):
        created.append((Stream(), Stream()))
        return created[-1]

    def defer(self, *args):
        assert On.current is not None, "the step runs outside a stream"
        context = contextvars.copy_context()  # it holds the caller's backend
        On.current.given.append(lambda: context.run(run, self, *args))

    monkeypatch.setattr(cuda_graph, "streams", streams)
    monkeypatch.setattr(cuda_graph.GraphedStep, "run", defer)
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return created
