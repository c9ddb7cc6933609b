"""What a case is: one kernel at one shape, with everything that a test or a measurement of it needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Case:
    kernel: str  # the launcher's name
    shape: str  # for people
    variant: str  # cases of one kernel and variant are computed by the same compiled kernel, for one dtype
    make: Callable[[torch.device | str, torch.dtype], tuple[Tensor, ...]]  # the inputs; "meta" is a device as well
    run: Callable[..., Any]  # inputs -> a tensor or several: the launcher
    plain: Callable[..., Any]  # the same in plain torch, as one would write it in that dtype
    exact: Callable[..., Any]  # the same in float64
    bytes: Callable[[int], int]  # itemsize -> the fewest bytes that must be moved
    flops: int = 0  # of matrix products
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)  # name -> what makes the function
    hide: Callable[..., None] = lambda *inputs: None  # overwrite, in the inputs, what no result may depend on with NaN
    seen: Callable[..., tuple[Tensor, ...]] = lambda *results: results  # what of the results is the same whoever computed them
    chip: int = 80  # compute capability from which there is an instruction for its weights
    weights: Callable[..., tuple[Tensor | None, ...]] = lambda *inputs: ()  # the inputs that no kernel writes: weights and tables
    alone: Callable[..., Any] | None = None  # run, without what puts back the inputs that it changes

    @property
    def bare(self) -> Callable[..., Any]:
        return self.alone or self.run

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


def compiled(function: Callable) -> Callable:
    """For one shape; a graph break or a second one would be an error, not a slower program."""
    torch.compiler.reset()  # of what earlier cases compiled from the same function
    return torch.compile(function, fullgraph=True, dynamic=False)
