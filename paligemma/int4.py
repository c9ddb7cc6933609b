"""4-bit weights: groups of 32 numbers along the input, each with one scale.

    w[n, k] = (code[n, k] - 8) * scale[n, k // 32]        code 0 to 15, scale in bfloat16, of either sign

Eight codes are stored in an int32, so that the four words of a group are one 128-bit load. Word c = 0..3 of
group g holds, in its bits 4 i to 4 i + 3, the code of k = 32 g + 4 i + c, for i = 0..7. For one i, the four words
therefore hold four neighbouring codes. The dtype int32 tells a 4-bit weight from the others."""

import torch
from torch import Tensor

GROUP = 32  # numbers that share a scale; every width of the published models is a multiple
WORDS = GROUP // 8  # int32 words of a group
ZERO = 8  # the code of 0
# Numbers that are quantised at a time: 1 MB in float32, in a CPU's cache; fewer launches on a GPU.
BLOCK, GPU_BLOCK = 1 << 18, 1 << 25
# What the search multiplies a group by, after its extreme was divided to 1: the extreme then gets the code -8,
# or is clamped to it, or a code next to it; or, for positive factors, the code 7.
FACTORS = (-9.4, -8.9, -8.5, -8.2, -8.0, -7.7, -7.4, -7.1, -6.8, 6.6, 6.9, 7.2, 7.5, 8.0)


def pack(codes: Tensor) -> Tensor:  # (N, K) uint8, 0 to 15 -> (N, K // 8) int32
    N, K = codes.shape
    fields = codes.view(N, K // GROUP, 8, WORDS).int()
    words = fields[:, :, 0].clone()
    for i in range(1, 8):
        words |= fields[:, :, i] << 4 * i
    return words.view(N, K // 8)


def unpack(words: Tensor) -> Tensor:  # (N, K // 8) int32 -> (N, K) uint8
    N, count = words.shape
    groups = words.view(N, count // WORDS, 1, WORDS)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[:, None]
    return ((groups >> shifts) & 15).to(torch.uint8).view(N, 8 * count)


def dequantized(
    words: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:  # (N, K // 8), (N, K // 32) -> (N, K)
    """The numbers of a weight, in `out` of that dtype if memory is given. They are exact in float32: each is a
    product of a 4-bit integer and a bfloat16 number. In another dtype each of them is rounded once."""
    N, G = scale.shape
    codes = (unpack(words).to(torch.int8) - ZERO).view(N, G, GROUP)
    out = torch.empty(N, GROUP * G, dtype=dtype, device=words.device) if out is None else out
    torch.mul(codes, scale.float()[..., None], out=out.view(N, G, GROUP))
    return out


def quantized_groups(weight: Tensor) -> tuple[Tensor, Tensor]:  # (N, K) -> (N, K // 8) int32, (N, K // 32)
    """The words and the scales of the codes with the smallest sum of squared errors that the search finds.

    K must be a multiple of 32. A group with NaN or infinity gets the scale NaN. Some rows are converted at a
    time, in memory that stays in the cache."""
    N, K = weight.shape
    words = torch.empty(N, K // 8, dtype=torch.int32, device=weight.device)
    scales = torch.empty(N, K // GROUP, dtype=torch.bfloat16, device=weight.device)
    block = BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    step = max(1, min(N, block // max(1, K)))
    for start in range(0, N, step):
        part = slice(start, start + step)
        # Groups in the last axis: sums over a group then add vectors.
        values = weight[part].reshape(-1, GROUP).t().float().contiguous()
        codes, scale = _least_squares(values)
        words[part] = pack(codes.t().reshape(-1, K))
        scales[part] = scale.view(-1, K // GROUP)
    return words, scales


def _least_squares(
    values: Tensor,
) -> tuple[Tensor, Tensor]:  # (32, M) float32 -> (32, M) uint8, (M,) bfloat16
    """For codes that are given, the best scale is sum(w * code) / sum(code^2), which leaves the squared error
    sum(w^2) - sum(w * code)^2 / sum(code^2). The factor whose codes leave the least is taken. Then the scale is
    rounded, and the codes are chosen again for the rounded scale."""
    extreme = values.gather(0, values.abs().argmax(dim=0)[None])[0]
    tiny = extreme.abs() < 2.0**-100  # numbers so small are taken as 0; their reciprocals might overflow
    x = values / extreme.masked_fill(tiny, 1)
    codes, terms = torch.empty_like(x), torch.empty_like(x)
    best, chosen = torch.full_like(extreme, -1), torch.zeros_like(extreme)

    def fit(factor: float | Tensor) -> tuple[Tensor, Tensor]:
        """The codes of x * factor; sum(x * code) and sum(code^2)."""
        torch.mul(x, factor, out=codes).round_().clamp_(-8, 7)
        return torch.mul(codes, x, out=terms).sum(dim=0), torch.mul(codes, codes, out=terms).sum(dim=0)

    for factor in FACTORS:
        product, square = fit(factor)
        gain = product * product / square
        better = gain > best
        best, scale = torch.where(better, gain, best), product / square
        chosen = torch.where(better, scale, chosen)
    rounded = (chosen * extreme).bfloat16()
    torch.mul(x, extreme / rounded.float(), out=codes).round_().clamp_(-8, 7)
    rounded = rounded.masked_fill(tiny, 0).masked_fill(~extreme.isfinite(), torch.nan)
    return codes.nan_to_num_(0).add_(ZERO).to(torch.uint8), rounded
