"""Gemma's RMSNorm: y = x / sqrt(mean(x^2) + eps) * (1 + weight).

x, y (N, E); weight (E,). A program owns a row: it sums the squares in one pass over the row and normalises in a second, which
reads from the cache what the first has brought in; so 2 x N x E x itemsize bytes are moved. float32 inside, one rounding at
the store: 1 + weight in bfloat16 would lose most of the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, eps, E: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * E
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + e, mask=e < E, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=0) / E + eps)
    for start in tl.static_range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + e, mask=e < E, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
        tl.store(y_ptr + row + e, (x * scale * (1 + weight)).to(y_ptr.dtype.element_ty), mask=e < E)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., E), (E,) -> (..., E)
    """For contiguous tensors of one dtype on one device."""
    E = x.shape[-1]
    assert weight.shape == (E,), f"weight {tuple(weight.shape)} for {E} features"
    assert x.dtype == weight.dtype
    assert x.device == weight.device
    assert x.is_contiguous()
    assert weight.is_contiguous()
    y = torch.empty_like(x)
    rms_norm_kernel[(x.numel() // E,)](x, weight, y, eps, E=E, BLOCK=block_of(E), num_warps=4)
    return y


def block_of(size: int) -> int:
    """The largest power of two up to 2048 that divides `size`, if that is at least 256; else the next power above it, masked.

    2304, 3584 and 4608 features are 9 x 256, 7 x 512 and 9 x 512: no lane is idle, where one power of two would idle 44 %."""
    divisor = size & -size
    return min(divisor, 2048) if divisor >= 256 else min(triton.next_power_of_2(size), 2048)
