"""Products by torch with weights that it cannot multiply as they are stored: some rows of a weight at a time
are widened in memory that the next rows reuse."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int4
from .cpu_instructions import multiplies

BLOCK = 1 << 21  # values of a weight that are widened at a time: 8 MB in float32, which stay in the cache


def in_float32(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    rows, out = x.float(), torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    for part, wide in _parts(weight, torch.float32):
        torch.mm(rows, wide.t(), out=out[:, part])
    return finish(out, scale, bias, x.dtype)


def in_bfloat16(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """oneDNN multiplies its float32 sums by the scale, before it rounds them."""
    assert scale is not None
    assert scale.dtype == x.dtype  # another dtype would be rounded
    rows, out = x.contiguous(), torch.empty(len(x), len(weight), dtype=x.dtype, device="cpu")
    for part, wide in _parts(weight, x.dtype):
        factors = scale[part].repeat(len(x), 1)
        out[:, part] = torch.ops.mkldnn._linear_pointwise.binary(rows, factors, wide, None, "mul")
    return out


def four_bit(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The numbers of the weight are exact in float32. For products in bfloat16 they are rounded to it; the
    error of the result is then 1.3 times that of rounding it alone."""
    assert scale is not None
    (N, K), dtype = (len(weight), x.shape[1]), x.dtype if multiplies(x.dtype) else torch.float32
    added = None if bias is None else bias.to(dtype)
    rows, out = int4.reordered(x).to(dtype), torch.empty(len(x), N, dtype=x.dtype, device="cpu")
    step = min(N, max(1, BLOCK // 2 // K))  # half as many numbers, which are in the cache twice
    memory = torch.empty(step, K, dtype=torch.float32, device="cpu")
    narrow = torch.empty(step, K, dtype=dtype, device="cpu") if dtype != torch.float32 else None
    for n in range(0, N, step):
        part = slice(n, n + step)
        wide = int4.widened(weight[part], scale[part], memory[: len(weight[part])])
        wide = wide if narrow is None else narrow[: len(wide)].copy_(wide)
        out[:, part] = F.linear(rows, wide, None if added is None else added[part])
    return out


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight at a time, widened to float32 or bfloat16, in memory that the next rows reuse."""
    N, K = weight.shape
    step = min(N, max(1, BLOCK // K))
    memory = torch.empty(step, K, dtype=dtype, device="cpu")
    for n in range(0, N, step):
        part = slice(n, n + step)
        yield part, widened(weight[part], memory)


def finish(out: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = out if scale is None else out * scale.float()
    return (out if bias is None else out + bias.float()).to(dtype).contiguous()


def widened(weight: Tensor, memory: Tensor) -> Tensor:
    """A weight (N, K) in float32 or bfloat16, exactly: in `memory` of that dtype, which has at least as many
    rows. New memory for each part of a weight would take longer than the conversion. The bits of an e4m3
    number that is not NaN, moved to their places in either dtype, are 2^-120 of that number."""
    wide = memory[: len(weight)]
    if weight.dtype != torch.float8_e4m3fn:
        return wide.copy_(weight)
    integer, low = (torch.int32, 16) if wide.dtype == torch.float32 else (torch.int16, 0)
    bits = wide.view(integer).copy_(weight.view(torch.int8))  # with copies of the sign in front
    bits.bitwise_left_shift_(4 + low).bitwise_and_(-0x7810 << low)
    return wide.mul_(2.0**120)
