"""SigLIP's LayerNorm, alone or with the residual addition before it.

    y = (z - mean(z)) / sqrt(mean((z - mean(z))^2) + eps) * weight + bias,    z = x, or z = x + residual

x, residual, y, z (N, E); weight, bias (E,). A program reads a few rows three times, a block of features at a
time: for the mean, for the variance about it, and to normalise. The second and third time it finds them in
the cache, so 2 x N x E x itemsize bytes are moved, or 4 x with the residual. Arithmetic is float32, with one
rounding at each store (z is rounded before it is used)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import blocks_of


@triton.jit(do_not_specialize=["N"])
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, eps, N,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mean, scale = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    for step in tl.static_range(3):  # mean, variance, result
        part = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in tl.static_range(0, E, BLOCK):
            e = tl.broadcast_to(first + tl.arange(0, BLOCK)[None, :], [ROWS, BLOCK])
            inside = (row < N) & (e < E)
            z = tl.load(x_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
            if residual_ptr is not None:
                z = (
                    z + tl.load(residual_ptr + row * E + e, mask=inside, other=0.0).to(tl.float32)
                ).to(sum_ptr.dtype.element_ty)  # fmt: skip
                if step == 0:
                    tl.store(sum_ptr + row * E + e, z, mask=inside)
                z = z.to(tl.float32)
            if step == 0:
                part += z
            elif step == 1:
                part += tl.where(e < E, (z - mean) * (z - mean), 0.0)
            else:
                weight = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
                bias = tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
                tl.store(
                    y_ptr + row * E + e, ((z - mean) * scale * weight + bias).to(y_ptr.dtype.element_ty),
                    mask=inside,
                )  # fmt: skip
        if step == 0:
            mean = tl.sum(part, axis=1)[:, None] / E
        elif step == 1:
            scale = tl.rsqrt(tl.sum(part, axis=1)[:, None] / E + eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(..., E), (E,), (E,) -> (..., E). All contiguous, of one dtype, on one device."""
    y, _ = _launch(x, None, weight, bias, eps)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The normalised sum of x and residual, and the sum itself, (..., E) each. All contiguous, of one dtype,
    on one device."""
    return _launch(x, residual, weight, bias, eps)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    E = x.shape[-1]
    given = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    assert weight.shape == (E,), f"weight {tuple(weight.shape)} for {E} features"
    assert bias.shape == (E,), f"bias {tuple(bias.shape)} for {E} features"
    assert residual is None or residual.shape == x.shape
    assert all(a.dtype == x.dtype and a.device == x.device and a.is_contiguous() for a in given)
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    N, (rows, block) = x.numel() // E, blocks_of(E)
    layer_norm_kernel[(triton.cdiv(N, rows),)](
        x, residual, weight, bias, y, total, eps, N,
        E=E, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y, total
