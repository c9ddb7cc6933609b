"""linear: the linear layers of a prefill, with or without a bias and GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.kernels.linear import Form, linear

from .case import Case

# the tiles that are measured beside cuBLAS
TILES = (Form(64, 64, 64, 4, 4), Form(64, 128, 64, 4, 4), Form(128, 128, 64, 4, 8))


def linear_case(
    shape: str, rows: int, size_in: int, size_out: int, form: Form, bias: bool = False, gelu: bool = False
) -> Case:
    """In float32 the kernel runs with a small tile instead of the tile of the form, because float32 products
    take their operands from registers."""

    def make(device, dtype):
        x = torch.randn(rows, size_in, device=device, dtype=dtype)
        weight = size_in**-0.5 * torch.randn(size_out, size_in, device=device, dtype=dtype)
        biases = [torch.randn(size_out, device=device, dtype=dtype)] if bias else []
        return x, weight, *biases

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        small = Form(32, 32, 32, 1, 4, form.splits)
        return linear(x, weight, bias, small if x.dtype == torch.float32 else form, gelu)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    variant = f"{form._replace(splits=1)}{' bias' * bias}{' gelu' * gelu}{' split' * (form.splits > 1)}"
    variant += " odd" * bool(size_in % 16 or size_out % 16)
    return Case(
        "linear", shape, variant, make, run, plain, lambda *inputs: plain(*(x.double() for x in inputs)),
        lambda itemsize: itemsize * (rows * size_in + size_out * size_in + rows * size_out + size_out * bias),
        2 * rows * size_in * size_out, weights=lambda *inputs: inputs[1:],
    )  # fmt: skip
