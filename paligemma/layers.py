"""The parameters of one operation, as modules with the checkpoint's names. Both towers are made of these."""

import torch
from torch import Tensor, nn

from . import ops


def parameter(*shape: int) -> nn.Parameter:
    """A parameter to be filled by the loader: this model is for inference, nothing is initialised."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Linear(nn.Module):
    def __init__(self, size_in: int, size_out: int, bias: bool = False):
        super().__init__()
        self.weight = parameter(size_out, size_in)
        self.bias = parameter(size_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = parameter(size), parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class AddLayerNorm(nn.Module):
    """The norm of x + residual, and that sum."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = parameter(size), parameter(size)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(nn.Module):
    """The norm of x + residual, and that sum."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = parameter(size)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
