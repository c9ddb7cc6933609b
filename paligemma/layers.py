"""The parameters of one operation, as modules with the checkpoint's names. Both towers are made of these."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import ops

QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # what --quantize can make of a weight


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter to be filled by the loader: this model is for inference, nothing is initialised."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """Without a bias it may be of 8 bits: numbers, and what each output's are multiplied by."""

    def __init__(self, size_in: int, size_out: int, bias: bool = False, quantize: str | None = None):
        super().__init__()
        self.weight = parameter(size_out, size_in, dtype=QUANTIZED[quantize] if quantize else None)
        self.weight_scale = parameter(size_out) if quantize else None
        self.bias = parameter(size_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_scale is not None:
            return ops.quantized_linear(x, self.weight, self.weight_scale)
        return ops.linear(x, self.weight, self.bias)


class AddLayerNorm(nn.Module):
    """The norm of the residual stream, and that stream itself: where it is a sum that is not made yet, made."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = parameter(size), parameter(size)

    def forward(self, x: Tensor | ops.Sum) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor):
            return ops.layer_norm(x, self.weight, self.bias, self.eps), x
        assert x.norm is None
        return ops.add_layer_norm(x.branch, x.x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(nn.Module):
    """The norm of the residual stream, and that itself: where it is a sum yet to be made, made."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = parameter(size)

    def forward(self, x: Tensor | ops.Sum) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor):
            return ops.rms_norm(x, self.weight, self.eps), x
        assert x.norm is None
        return ops.add_rms_norm(x.branch, x.x, self.weight, self.eps)


def pack(linears: Iterable[Linear]) -> None:
    """Put weights that one product reads into one allocation, of which they become views."""
    for name in ("weight", "weight_scale", "bias"):
        parts = [part for linear in linears if (part := getattr(linear, name)) is not None]
        if parts:
            for part, view in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                part.data = view
