"""Gemma's RMSNorm, alone or with the residual addition before it.

    y = z / sqrt(mean(z^2) + eps) * (1 + weight),    z = x, or z = x + residual

x, residual, y, z (N, E); weight (E,). A program reads a few rows twice, a block of features at a time: for
the sum of squares, and to normalise. The second time it finds them in the cache, so 2 x N x E x itemsize
bytes are moved, or 4 x with the residual. Arithmetic is float32, with one rounding at each store (z is
rounded before it is squared); in bfloat16, 1 + weight would lose most of the weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import blocks_of


@triton.jit(do_not_specialize=["N"])
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, eps, N,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.static_range(0, E, BLOCK):
        e = tl.broadcast_to(first + tl.arange(0, BLOCK)[None, :], [ROWS, BLOCK])
        inside = (row < N) & (e < E)
        z = tl.load(x_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            z = (
                z + tl.load(residual_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
            ).to(sum_ptr.dtype.element_ty)  # fmt: skip
            tl.store(sum_ptr + row * E + e, z, mask=inside)
            z = z.to(tl.float32)
        squares += z * z
    scale = tl.rsqrt(tl.sum(squares, axis=1) / E + eps)[:, None]
    for first in tl.static_range(0, E, BLOCK):
        e = tl.broadcast_to(first + tl.arange(0, BLOCK)[None, :], [ROWS, BLOCK])
        inside = (row < N) & (e < E)
        z = tl.load(x_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            z = (
                z + tl.load(residual_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
            ).to(sum_ptr.dtype.element_ty).to(tl.float32)  # fmt: skip
        weight = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * E + e, (z * scale * (1 + weight)).to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., E), (E,) -> (..., E). All contiguous, of one dtype, on one device."""
    y, _ = _launch(x, None, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised sum of x and residual, and the sum itself, (..., E) each. All contiguous, of one dtype,
    on one device."""
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    E = x.shape[-1]
    given = [x, weight] if residual is None else [x, weight, residual]
    assert weight.shape == (E,), f"weight {tuple(weight.shape)} for {E} features"
    assert residual is None or residual.shape == x.shape
    assert all(a.dtype == x.dtype and a.device == x.device and a.is_contiguous() for a in given)
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    N, (rows, block) = x.numel() // E, blocks_of(E)
    rms_norm_kernel[(triton.cdiv(N, rows),)](
        x, residual, weight, y, total, eps, N,
        E=E, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y, total
