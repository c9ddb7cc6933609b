"""Simulates a CUDA graph on a CPU: records the operations of a function with the tensors that they read and
write, and repeats them on the same tensors, without the function.

Python values, and values read back from a tensor, are frozen in the recording, as in a graph. An operation
that a graph cannot hold raises.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "equal",
    "lift_fresh",
)  # the host waits for their results, or has made them


class Done(NamedTuple):
    """One operation: a function that repeats it, with its results in the same memory; whether it is a
    programmatic dependent launch; whether it only allocates memory."""

    again: Callable[[], None]
    dependent: bool = False
    allocates: bool = False


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done: list[Done] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in FORBIDDEN or by_mask:
            raise RuntimeError(
                f"{func.name()} has no place in a graph: the host would wait for its result, or has made it"
            )
        out = func(*args, **kwargs)
        if not any(returned.alias_info for returned in func._schema.returns):  # neither a view nor in place
            results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]

            def again():
                for x, y in zip(
                    results,
                    (y for y in tree_leaves(func(*args, **kwargs)) if isinstance(y, torch.Tensor)),
                    strict=True,
                ):
                    x.copy_(y)

            self.done.append(Done(again, allocates="empty" in name))
        elif any(returned.alias_info and returned.alias_info.is_write for returned in func._schema.returns):
            self.done.append(Done(lambda: func(*args, **kwargs)))
        return out


def recorded(work: Callable[[], Any]) -> tuple[list[Done], Any]:
    """The operations of work(), and what it returned."""
    recorder, launch = Recorder(), GridExecutor.__call__

    def launched(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)
            recorder.done.append(Done(lambda: launch(self, *args, **kwargs), kwargs.get("launch_pdl", False)))

    def looked(*_, **__):
        raise RuntimeError("a look at a tensor has no place in a graph: the host would wait for it")

    with (
        mock.patch.object(GridExecutor, "__call__", launched),
        mock.patch.multiple(torch.Tensor, tolist=looked, numpy=looked),
        recorder,
    ):
        result = work()
    return recorder.done, result


def capture(work: Callable[[], None], pool) -> tuple[Callable[[], None], int]:
    """Replaces paligemma.cuda_graph.capture. Recording already does the work here: the first replay does
    nothing."""
    done, _ = recorded(work)
    fresh = True

    def replay():
        nonlocal fresh
        for operation in () if fresh else done:
            operation.again()
        fresh = False

    return replay, 0
