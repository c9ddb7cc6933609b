"""Modules that hold the parameters of one operation each, under the names of the checkpoint. The vision tower
and the decoder are built from them."""

import torch
from torch import Tensor, nn

from . import int4, ops

# The dtypes in which quantised weights are stored, by the names that --quantize takes.
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
QUANTIZED = EIGHT_BITS | {"int4": int4.STORED}  # eight codes in each number: see int4.py


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter that the loader fills. It is not initialised, because the model is for inference."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """x @ weight^T + bias. A weight without a bias may be 8-bit, with a scale for each output, or 4-bit."""

    def __init__(self, size_in: int, size_out: int, bias: bool = False, quantize: str | None = None):
        super().__init__()
        self.features, self.weight, self.weight_scale = size_in, parameter(size_out, size_in), None
        if quantize == "int4":
            self.weight = parameter(size_out, size_in // 8, dtype=int4.STORED)
            self.weight_scale = parameter(size_out, size_in // int4.GROUP, dtype=torch.bfloat16)
        elif quantize:
            self.weight = parameter(size_out, size_in, dtype=QUANTIZED[quantize])
            self.weight_scale = parameter(size_out)
        self.bias = parameter(size_out) if bias else None

    @property
    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The weight and its scale."""
        return self.weight, self.weight_scale

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.weight_scale is not None:
            return ops.quantized_linear(x, self.weight, self.weight_scale)
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = parameter(size), parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
