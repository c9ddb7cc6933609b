"""4-bit weights: groups of 32 numbers along the input, each with one scale.

    w[n, k] = (code[n, k] - 8) * scale[n, k // 32]        code 0 to 15, scale in bfloat16, of either sign

Eight codes are stored in an int32, so that the four words of a group are one 128-bit load. Word c = 0..3 of
group g holds, in its bits 4 i to 4 i + 3, the code of k = 32 g + 4 i + c, for i = 0..7. For one i, the four
words therefore hold four neighbouring codes. The dtype int32 tells a 4-bit weight from the others."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .cpu_threads import one_thread, threads

STORED = torch.int32  # the dtype of the words
GROUP = 32  # numbers that share a scale; every width of the published models is a multiple
WORDS = GROUP // 8  # int32 words of a group
ZERO = 8  # the code of 0
FLIPPED = -0x77777778  # the highest bit of each code
# Numbers that are quantised at a time: 1 MB in float32, in a CPU's cache; fewer launches on a GPU.
BLOCK, GPU_BLOCK = 1 << 18, 1 << 22
# The search divides a group by its extreme, multiplies it by each of these, and rounds the products.
FACTORS = (-9.4, -9.0, -8.65, -8.35, -8.05, -7.75, -7.45, -7.15, -6.8, -6.4)


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


def widened(words: Tensor, scale: Tensor, out: Tensor) -> Tensor:  # (N, K // 8), (N, K // 32), (N, K)
    """The numbers of a weight in `out`, which is float32, exactly: each is a product of a 4-bit integer and a
    bfloat16 number. They are in the order of `reordered`, in which a vector of words gives a vector of
    numbers; to move them to their own order takes longer than to compute them."""
    N, G = scale.shape
    high = (words ^ FLIPPED).view(torch.int8).view(N, G, GROUP // 2)  # code - 8 in two's complement
    low = high << 4
    halves, factor = out.view(N, 2, G, GROUP // 2), scale.float()[..., None]
    torch.mul(low.bitwise_right_shift_(4), factor, out=halves[:, 0])
    torch.mul(high.bitwise_right_shift_(4), factor, out=halves[:, 1])
    return out


def reordered(x: Tensor) -> Tensor:  # (R, K) -> (R, K)
    """x for products with the numbers of `widened`."""
    R, K = x.shape
    return x.view(R, K // GROUP, 4, 2, WORDS).permute(0, 3, 1, 4, 2).reshape(R, K)


def dequantized(
    words: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:  # (N, K // 8), (N, K // 32) -> (N, K)
    """The numbers of a weight in their own order, in `out` of that dtype if memory is given. They are exact
    in float32; in another dtype each of them is rounded once."""
    N, G = scale.shape
    wide = widened(words, scale, torch.empty(N, G * GROUP, dtype=torch.float32, device=words.device))
    out = torch.empty(N, G * GROUP, dtype=dtype, device=words.device) if out is None else out
    out.view(N, G, 4, 2, WORDS).copy_(wide.view(N, 2, G, WORDS, 4).permute(0, 2, 4, 1, 3))
    return out


def quantized_groups(weight: Tensor) -> tuple[Tensor, Tensor]:  # (N, K) -> (N, K // 8) int32, (N, K // 32)
    """The words and scales of a weight. A search chooses those with the smallest sum of squared errors. With
    torch alone it takes 12 s for 2 billion numbers on two Zen 5 cores; see also kernels/cpu_quantize.py.

    K is a multiple of 32. A group with NaN or infinity gets the scale NaN. Some rows are converted at a time,
    in memory that stays in the cache. On a CPU, each thread has rows of its own: threads that share every
    operation took 44 s if they sleep while they wait, as on the command lines."""
    N, K = weight.shape
    words = torch.empty(N, K // 8, dtype=torch.int32, device=weight.device)
    scales = torch.empty(N, K // GROUP, dtype=torch.bfloat16, device=weight.device)
    block = BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    step = max(1, min(N, block // max(1, K)))

    inference = torch.is_inference_mode_enabled()

    def convert(start: int) -> None:
        part = slice(start, start + step)
        codes, scale = least_squares(weight[part].float().reshape(-1, GROUP))
        words[part], scales[part] = pack(codes.view(-1, K)), scale.view(-1, K // GROUP)

    def alone(start: int) -> None:
        with one_thread(), torch.inference_mode(inference):
            convert(start)

    if weight.device.type == "cpu":
        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(alone, range(0, N, step)))
    else:
        for start in range(0, N, step):
            convert(start)
    return words, scales


def least_squares(groups: Tensor) -> tuple[Tensor, Tensor]:  # (M, 32) -> (M, 32) uint8, (M,) bfloat16
    """Codes and scales of groups in float32.

    The best scale for codes that are given is sum(w c) / sum(c^2), which leaves the squared error
    sum(w^2) - sum(w c)^2 / sum(c^2). Of the codes that the factors give, those that leave the least are
    taken. Their scale is rounded, and the codes are chosen again for the rounded scale.

    The search rounds w, as a part of the group's extreme, to multiples of 2^-15. Its sums are then exact in
    float32: they do not depend on the order of addition, which differs between machines."""
    least, most = groups.amin(dim=1), groups.amax(dim=1)
    extreme = torch.where(most > -least, most, least)
    zero = extreme.abs() < 2.0**-100  # so small that reciprocals might overflow
    extreme.masked_fill_(zero, 1)
    x = groups / extreme[:, None]
    coarse = torch.mul(x, 2.0**15).round_().mul_(2.0**-15)
    codes, terms = torch.empty_like(x), torch.empty_like(x)
    best, scale = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for factor in FACTORS:
        torch.mul(coarse, factor, out=codes).round_().clamp_(-8, 7)
        product = torch.mul(codes, coarse, out=terms).sum(dim=1)
        square = torch.mul(codes, codes, out=terms).sum(dim=1)
        left = product * product / square
        scale = torch.where(left > best, product / square, scale)
        best = torch.maximum(best, left)
    rounded = (scale * extreme).bfloat16()  # NaN if the extreme is not finite: no sum was larger than 0
    torch.mul(x, (extreme / rounded)[:, None], out=codes).round_().clamp_(-8, 7)
    codes.masked_fill_((zero | rounded.isnan())[:, None], 0)
    return codes.add_(ZERO).to(torch.uint8), rounded.masked_fill_(zero, 0)
