"""Simulates a CUDA graph on a CPU: records the operations of a function, and repeats them without it.

The repeated operations read and write the same tensors. Python values, and values read back from a tensor,
are frozen in the recording, as in a graph. An operation that a graph cannot hold raises RuntimeError.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

# The host waits for the results of these operations, or has computed them (lift_fresh).
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh")


class Done(NamedTuple):
    """One operation."""

    again: Callable[[], None]  # repeats it, with its results in the same memory
    dependent: bool = False  # whether it is a programmatic dependent launch
    allocates: bool = False  # whether it only allocates memory


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done: list[Done] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        by_index = name in ("index", "index_put", "index_put_")
        by_mask = by_index and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in FORBIDDEN or by_mask:
            raise RuntimeError(f"{func.name()} is not possible in a graph: it needs the host during a replay")
        out = func(*args, **kwargs)
        if not any(returned.alias_info for returned in func._schema.returns):  # neither a view nor in place
            results = tensors(out)

            def again():
                for x, y in zip(results, tensors(func(*args, **kwargs)), strict=True):
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

    def refuse(*_, **__):
        raise RuntimeError("a graph cannot read a tensor's values on the host: the host would wait for them")

    launches = mock.patch.object(GridExecutor, "__call__", launched)
    with launches, mock.patch.multiple(torch.Tensor, tolist=refuse, numpy=refuse), recorder:
        result = work()
    return recorder.done, result


def capture(work: Callable[[], None], pool) -> tuple[Callable[[], None], int]:
    """Replaces paligemma.cuda_graph.capture.

    Unlike a capture, a recording does the work; so the first replay does nothing.
    """
    done, _ = recorded(work)
    fresh = True

    def replay():
        nonlocal fresh
        for operation in () if fresh else done:
            operation.again()
        fresh = False

    return replay, 0
