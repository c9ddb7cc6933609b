"""Muon, the optimiser of the blocks' matrices (https://kellerjordan.github.io/posts/muon): its update is the
momentum with all singular values moved to about 1. torch.optim.Muon computes the same, but one matrix at a
time and in bfloat16, whose products are slow on small CPUs."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """A group holds all matrices of one shape, which are updated together. A step is about as long as a step
    of AdamW with the same learning rate."""

    def __init__(
        self, matrices: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  (no closure)
        for group in self.param_groups:
            gradient = torch.stack([matrix.grad for matrix in group["params"]])
            state = self.state[group["params"][0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonal(gradient.lerp(momentum, group["momentum"]))  # Nesterov momentum
            length = 0.2 * max(update.shape[1:]) ** 0.5  # 0.2: the root mean square of AdamW's updates
            for matrix, change in zip(group["params"], update, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"] * length)


def orthogonal(x: Tensor) -> Tensor:  # (N, A, B)
    """The matrices with their singular values moved to between 0.7 and 1.2, by five steps of a Newton-Schulz
    iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.transpose(1, 2)).transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x
