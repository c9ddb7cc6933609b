"""What a case is: one kernel at one shape, with everything that a test or a measurement of it needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """One kernel at one shape. `run`, `plain`, `exact`, `hide`, `weights` and the peers take the inputs that
    `make` returns; a call may change them."""

    kernel: str  # the launcher's name
    shape: str  # a description, for reports
    variant: str  # cases of one kernel, variant and dtype use the same compiled kernel
    # (device, dtype) -> inputs; the device may be "meta"
    make: Callable[[torch.device | str, torch.dtype], tuple[Tensor, ...]]
    run: Callable[..., Any]  # inputs -> one tensor or several, by the launcher
    plain: Callable[..., Any]  # the same in plain torch, in the dtype of the inputs
    exact: Callable[..., Any]  # the same in float64
    bytes: Callable[[int], int]  # itemsize -> the smallest number of bytes that a kernel must read and write
    flops: int = 0  # of matrix products
    # name -> a function that returns another implementation of run
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    # overwrites with NaN the values of the inputs that no result may depend on
    hide: Callable[..., None] = lambda *inputs: None  # fmt: skip
    # results -> the values on which every correct implementation agrees
    seen: Callable[..., tuple[Tensor, ...]] = lambda *results: results  # fmt: skip
    chip: int = 80  # 10 x the lowest compute capability that has instructions for the dtype of the weights
    # inputs -> those that no kernel writes: weights and tables
    weights: Callable[..., tuple[Tensor | None, ...]] = lambda *inputs: ()  # fmt: skip
    # run without the copy that restores the inputs which the kernel changes; None: run has no such copy
    alone: Callable[..., Any] | None = None

    @property
    def bare(self) -> Callable[..., Any]:
        """The launcher and nothing else."""
        return self.alone or self.run

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


def compiled(function: Callable) -> Callable:
    """torch.compile of a function for one shape. A graph break is an error, not a slower program."""
    torch.compiler.reset()  # forget what earlier cases compiled from the same function
    return torch.compile(function, fullgraph=True, dynamic=False)
