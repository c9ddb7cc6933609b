"""Products with 4-bit weights, for gemv.py.

    w[n, k] = (q[n, k] - 8) scale[n, k // 32],    q from 0 to 15

A row of w is K / 8 words of 32 bits. The four words of a group of 32 features are 16 bytes, which a thread
loads at once: nibble i of word c, the lowest first, is q of feature 4 i + c of the group.

A code becomes a floating-point number by its bits: it replaces some bits of the significand of a constant.
The number is the constant plus a multiple of q, and the constant is subtracted from the sum of a group, not
from each weight. The scale is applied to the sum of a group too. So one row by FMA takes 2.5 instructions a
weight and tl.dot less than 2, without loads, norm and indices.

tl.dot sums over all features of a tile. To keep the sums of the groups apart, each row of z becomes as many
rows as the tile has groups, one for each group, and is zero outside of the group."""

import triton
import triton.language as tl

GROUP = tl.constexpr(32)


@triton.jit
def fused_constant(constant: tl.constexpr, R):
    """The constant, in a form that the compiler does not know to be constant: R is at most 16. An instruction
    that masks bits and sets others takes one immediate only; with two, it would be two instructions."""
    return constant + (R >> 8)


@triton.jit
def words(
    w_ptr, place: tl.constexpr, given, block, first,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALL_WANTED: tl.constexpr,
    BY_DOT: tl.constexpr,
):  # fmt: skip
    """The words of BLOCK_K features from `first` on -> (BLOCK_N, BLOCK_K / 8), or for tl.dot (BLOCK_K / 128,
    BLOCK_N, 16). In that shape, a thread loads what it needs as an operand of tl.dot."""
    n, wanted = place(block, given, BLOCK_N)
    if BY_DOT:
        n, wanted = n[None, :, None], wanted[None, :, None]
        word = 16 * tl.arange(0, BLOCK_K // 128)[:, None, None] + tl.arange(0, 16)[None, None, :]
    else:
        n, wanted, word = n[:, None], wanted[:, None], tl.arange(0, BLOCK_K // 8)[None, :]
    word += first // 8
    inside = word < K // 8
    if not ALL_WANTED:
        inside &= wanted
    if ALL_WANTED and K % BLOCK_K == 0:
        inside = True
    address = w_ptr + n.to(tl.int64) * (K // 8) + word
    return tl.load(address, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def scales_of_groups(
    scale_ptr, place: tl.constexpr, given, block, first,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALL_WANTED: tl.constexpr,
):  # fmt: skip
    """The scales of BLOCK_K features from `first` on -> (BLOCK_N, BLOCK_K / 32) bfloat16. The policy tells
    their loads, which may be narrow, from those of the words in the compiled code."""
    n, wanted = place(block, given, BLOCK_N)
    group = first // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
    inside = group < K // GROUP
    if not ALL_WANTED:
        inside &= wanted[:, None]
    if ALL_WANTED and K % BLOCK_K == 0:
        inside = True
    address = scale_ptr + n.to(tl.int64)[:, None] * (K // GROUP) + group
    return tl.load(address, mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def exact(words, scale):
    """(N, K / 8) words and (N, K / 32) scales -> the weights (N, K) in float32, which holds them exactly."""
    N: tl.constexpr = words.shape[0]
    G: tl.constexpr = scale.shape[1]
    q = tl.join(
        tl.join(tl.join(code(words, 0), code(words, 4)), tl.join(code(words, 2), code(words, 6))),
        tl.join(tl.join(code(words, 1), code(words, 5)), tl.join(code(words, 3), code(words, 7))),
    ).reshape(N, G, 4, 2, 2, 2)
    q = q.permute(0, 1, 3, 4, 5, 2).reshape(N, G, 32)
    return (q * scale.to(tl.float32)[:, :, None]).reshape(N, G * 32)


@triton.jit
def code(words, i: tl.constexpr):
    """q - 8 of nibble i."""
    return ((words >> (4 * i)) & 15).to(tl.float32) - 8.0


@triton.jit
def by_fma(words, scale, z, R):
    """(N, K / 8) words, (N, K / 32) scales and z (1, K) float32 -> the terms (N, K / 32) of the groups.

    Of two neighbouring nibbles, the lower replaces bits 15 to 18 of 1.0, which makes it 1 + q / 256, and the
    upper replaces bits 19 to 22, which makes it 1 + q / 16."""
    N: tl.constexpr = words.shape[0]
    G: tl.constexpr = scale.shape[1]
    one = fused_constant(0x3F800000, R)
    lower, upper = tl.split(z.reshape(G, 2, 2, 2, 4).permute(0, 4, 1, 2, 3))  # (G, 4, 2, 2) each
    lower *= 16
    sums = -tl.sum(tl.sum(lower * (1 + 8 / 256) + upper * 1.5, axis=3), axis=2)
    lower_even, lower_odd = tl.split(lower)
    upper_even, upper_odd = tl.split(upper)
    lower_0, lower_2 = tl.split(lower_even)
    lower_1, lower_3 = tl.split(lower_odd)
    upper_0, upper_2 = tl.split(upper_even)
    upper_1, upper_3 = tl.split(upper_odd)
    words = words.reshape(N, G, 4)
    sums = add_pair(sums[None], words << 15, lower_0, upper_0, one)
    sums = add_pair(sums, words << 7, lower_1, upper_1, one)
    sums = add_pair(sums, words >> 1, lower_2, upper_2, one)
    sums = add_pair(sums, words >> 9, lower_3, upper_3, one)
    return tl.sum(sums, axis=2) * (16 * scale.to(tl.float32))


@triton.jit
def add_pair(sums, words, lower, upper, one):
    sums += ((words & 0x78000) | one).to(tl.float32, bitcast=True) * lower[None]
    return sums + ((words & 0x780000) | one).to(tl.float32, bitcast=True) * upper[None]


@triton.jit
def interleaved(i):
    """The order of features in an operand of tl.dot: the i-th is this feature. A group of 32 threads holds 8
    rows of 4 groups, and a thread the words of one row and one group; neighbours in the order are the lower
    and the upper half of a word."""
    half, group, nibble, word = i % 2, i // 2 % 4, i // 8 % 4, i // 32 % 4
    return i // 128 * 128 + 32 * group + 16 * half + 4 * nibble + word


@triton.jit
def by_dot(words, scale, z, R, dtype: tl.constexpr):
    """(K / 128, N, 16) words, (N, K / 32) scales and z (rows, K) float32 in the interleaved order -> the
    terms (rows x K / 32, N) of the groups."""
    T: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    G: tl.constexpr = scale.shape[1]
    ROWS: tl.constexpr = z.shape[0]
    words = words.reshape(T, N, 4, 4)
    first = tl.join(halves(words, 0, R, dtype), halves(words, 1, R, dtype))
    last = tl.join(halves(words, 2, R, dtype), halves(words, 3, R, dtype))
    codes = tl.join(first, last).permute(0, 3, 6, 5, 2, 4, 1).reshape(128 * T, N)
    i, g = tl.arange(0, 128 * T), tl.arange(0, G)
    z = z.to(dtype)
    mine = (i // 128 * 4 + i // 2 % 4)[None, None, :] == g[None, :, None]
    bits = tl.where(mine, z.to(tl.int16, bitcast=True)[:, None, :], 0)
    apart = bits.to(tl.int16).to(dtype, bitcast=True).reshape(ROWS * G, 128 * T)
    totals = tl.sum(tl.sum(z.to(tl.float32).reshape(ROWS, T, 16, 4, 2), axis=4), axis=2).reshape(ROWS * G)
    sums = tl.broadcast_to((-136.0 if dtype == tl.bfloat16 else -72.0) * totals[:, None], [ROWS * G, N])
    sums = tl.dot(apart, codes, sums)
    scale = tl.trans(scale.to(tl.float32))
    return sums * tl.broadcast_to(scale[None], [ROWS, G, N]).reshape(ROWS * G, N)


@triton.jit
def halves(words, nibble: tl.constexpr, R, dtype: tl.constexpr):
    """The nibble of the lower and of the upper 16 bits -> (..., 2): 128 + q in bfloat16, 64 + q in
    float16."""
    if dtype == tl.bfloat16:
        both = ((words >> (4 * nibble)) & 0x000F000F) | fused_constant(0x43004300, R)
    else:
        both = (words << 4) if nibble == 0 else words >> (4 * nibble - 4)
        both = (both & 0x00F000F0) | fused_constant(0x54005400, R)
    lower, upper = (both & 0xFFFF).to(tl.int16), ((both >> 16) & 0xFFFF).to(tl.int16)
    return tl.join(lower.to(dtype, bitcast=True), upper.to(dtype, bitcast=True))
