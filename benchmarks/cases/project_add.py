"""project_add: the output projection of attention or of the MLP, of a decode."""

from functools import partial

import torch
from torch import Tensor

from paligemma.kernels.project_add import project_add

from .case import Case
from .gemv import Products


def project_case(shape: str, R: int, size_in: int, size_out: int, adds: bool, quantize: str | None) -> Case:
    """adds: the kernel adds the residual to its outputs; otherwise it returns their sums of squares too."""
    given = Products(R, size_in, size_out, False, quantize, normed=False)

    def make(device, dtype):
        inputs = given.make(device, dtype)
        return *inputs, *([torch.randn(R, size_out, device=device, dtype=dtype)] if adds else [])

    def run(*inputs: Tensor):
        rows, weight, scale, rest = given.read(*inputs)
        out, squares = project_add(rows.x, weight, scale, rest[0] if adds else None)
        return out if squares is None else (out, squares)

    def finish(y: Tensor, x: Tensor, rest: list[Tensor]):
        return y + rest[0] if adds else (y, y.to(torch.promote_types(y.dtype, torch.float32)).square())

    def seen(y: Tensor, *squares: Tensor):
        """The outputs, and for each row 0 if its sum of squares is that of its outputs, else 1."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return y, *((parts.sum(dim=1) / y.square().sum(dim=1) - 1).abs().gt(1e-5).long() for parts in squares)

    return Case(
        "project_add", shape, f"{given.variant}{' adds' * adds}", make, run,
        lambda *inputs: finish(*given.plain(*inputs)), lambda *inputs: finish(*given.exact(*inputs)),
        partial(given.bytes, outputs=(1 + adds) * size_out),
        chip=given.chip, seen=seen, weights=given.weights,
    )  # fmt: skip
