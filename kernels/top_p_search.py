"""Top-p sampling, second of two kernels, launched twice: it finds the token at which the cumulative
probability reaches a target, without a sort.

The tokens of a row are ordered by their logits, the largest first, and tokens of equal logits by their ids,
the lowest first. C(v) is the weight of v and of all tokens before it. The first launch finds the last token
of the nucleus: the first v with C(v) >= top_p C(all). The second launch chooses the token:

    token[b] = the first v with C(v) > u[b] C(last of the nucleus)
    u[b] = uniform[b, output_length[b]] in [0, 1);   token[b] = -1 if a logit is not finite

The cumulative sums of the histogram give the bin of that token, and the weight before the bin. Each program
appends its tokens of this bin to a list, as sort keys, in any order. A counter tells which program finishes
last; that program searches the list. It divides an interval of keys by 16 keys, sums the weights above each
of them, and goes on with a 16th of the interval, until one token is left. The second launch resets the
scratch and the slots of the argmax. Each program reads 4 V + 32 K bytes per row from the L2 cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dependent, launch_dependents, wait_for_dependencies
from .norm_head import LOWEST
from .top_p_histogram import BINS, BLOCK, COUNTERS, LENGTHS, NUCLEUS, SCRATCH, bin_of, check, peak_of, weigh

LAST = tl.constexpr((1 << 19) - 1)
HIGHEST = tl.constexpr((1 << 63) - 1)


@triton.jit
def token_keys(logits, v):
    """int64 keys of magnitude below 2^50, in the reverse order of the tokens: the first token has the
    largest."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 is 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 19) | (LAST - v.to(tl.int64))


@triton.jit
def weight_of(numbers, peak, temperature):
    bits = (numbers >> 19).to(tl.int32)
    return weigh((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), peak, temperature)


@triton.jit
def above(numbers, weights, pivots):  # (CHUNK,), (CHUNK,), (PIVOTS,) -> (PIVOTS,)
    return tl.sum(tl.where(numbers[None, :] >= pivots[:, None], weights[None, :], 0), axis=1)


@triton.jit(do_not_specialize=["N"])
def top_p_search_kernel(
    logits_ptr, argmax_ptr, temperature_ptr, top_p_ptr, uniform_ptr, length_ptr,
    scratch_ptr, list_ptr, token_ptr, N, V: tl.constexpr, DRAWS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PIVOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    v, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    scratch_ptr += b * SCRATCH
    list_ptr += b * V
    bins = tl.arange(0, BINS)
    upto = tl.cumsum(tl.load(scratch_ptr + bins, cache_modifier=".cg"), axis=0)
    if DRAWS:
        nucleus = tl.load(scratch_ptr + NUCLEUS, cache_modifier=".cg")
        u = tl.load(uniform_ptr + b * N + tl.load(length_ptr + b))
        # u may be so close to 1 that the product is rounded to the nucleus.
        target = tl.minimum((u * nucleus.to(tl.float64)).to(tl.int64), nucleus - 1) + 1
    else:
        total = tl.max(upto, axis=0)
        share = tl.load(top_p_ptr + b) * total.to(tl.float64)
        target = share.to(tl.int64)
        target = tl.maximum(tl.minimum(tl.where(target.to(tl.float64) < share, target + 1, target), total), 1)
    before = upto < target
    bin = tl.sum(before.to(tl.int32), axis=0)
    target -= tl.max(tl.where(before, upto, 0), axis=0)  # the target among the bin's own weights

    peak, length = peak_of(argmax_ptr, b, V, SLOTS)
    logits = tl.load(logits_ptr + b * V + v, mask=v < length, other=float("-inf"))
    inside = (v < length) & (bin_of(logits, peak) == bin)
    place = tl.cumsum(inside.to(tl.int32), axis=0) - 1
    found = tl.sum(inside.to(tl.int32), axis=0)
    if found > 0:
        first = tl.atomic_add(scratch_ptr + LENGTHS + DRAWS, found.to(tl.int64), sem="relaxed")
        tl.store(list_ptr + first + place, token_keys(logits, v), mask=inside)
    tl.debug_barrier()  # every warp has written before one increments the counter
    if tl.atomic_add(scratch_ptr + COUNTERS + DRAWS, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        temperature = tl.load(temperature_ptr + b)
        count = tl.load(scratch_ptr + LENGTHS + DRAWS, cache_modifier=".cg").to(tl.int32)
        i = tl.arange(0, CHUNK)
        head = tl.load(list_ptr + i, mask=i < count, other=LOWEST, cache_modifier=".cg")
        head_weights = tl.where(i < count, weight_of(head, peak, temperature), 0)
        low, high = tl.min(tl.where(i < count, head, HIGHEST), axis=0), tl.max(head, axis=0)
        for start in range(CHUNK, count, CHUNK):
            more = tl.load(list_ptr + start + i, mask=start + i < count, other=LOWEST, cache_modifier=".cg")
            low = tl.minimum(low, tl.min(tl.where(start + i < count, more, HIGHEST), axis=0))
            high = tl.maximum(high, tl.max(more, axis=0))
        pivot = 1 + tl.arange(0, PIVOTS).to(tl.int64)
        while low < high:
            step = (high - low + PIVOTS - 1) // PIVOTS
            sums = above(head, head_weights, low + pivot * step)
            for start in range(CHUNK, count, CHUNK):
                more = tl.load(
                    list_ptr + start + i, mask=start + i < count, other=LOWEST, cache_modifier=".cg"
                )
                sums += above(
                    more, tl.where(start + i < count, weight_of(more, peak, temperature), 0),
                    low + pivot * step,
                )  # fmt: skip
            low += tl.sum((sums >= target).to(tl.int64), axis=0) * step
            high = tl.minimum(high, low + step - 1)
        if DRAWS:
            tl.debug_barrier()  # every warp has read what the stores below reset
            tl.store(token_ptr + b, tl.where(length > 0, LAST - (low & LAST), -1))
            tl.store(scratch_ptr + bins, tl.zeros([BINS], tl.int64))
            tl.store(scratch_ptr + BINS + tl.arange(0, SCRATCH - BINS), tl.zeros([SCRATCH - BINS], tl.int64))
            tl.store(argmax_ptr + b * SLOTS + tl.arange(0, SLOTS), tl.full([SLOTS], LOWEST, tl.int64))
        else:
            sums = tl.sum(tl.where(head >= low, head_weights, 0), axis=0)
            for start in range(CHUNK, count, CHUNK):
                more = tl.load(
                    list_ptr + start + i, mask=start + i < count, other=LOWEST, cache_modifier=".cg"
                )
                sums += tl.sum(
                    tl.where((start + i < count) & (more >= low), weight_of(more, peak, temperature), 0),
                    axis=0,
                )
            before_bin = tl.max(tl.where(before, upto, 0), axis=0)
            tl.store(scratch_ptr + NUCLEUS, before_bin + sums)


def top_p_search(
    logits: Tensor, argmax_scratch: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor,
    output_length: Tensor, scratch: Tensor, room: Tensor, tokens: Tensor | None,
) -> None:  # fmt: skip
    """logits, argmax_scratch, temperature and scratch as in top_p_histogram; top_p (B,) float64; uniform
    (B, N) float64, of which row b uses column output_length[b]; output_length (B,) int64; room (B, V) int64,
    for the lists; tokens (B,) int64, the output, or None in the first of the two launches. All contiguous."""
    check(logits, argmax_scratch, temperature, scratch)
    B, V = logits.shape
    assert top_p.shape == uniform.shape[:1] == (B,)
    assert output_length.shape == (B,)
    assert room.shape == (B, V)
    assert tokens is None or tokens.shape == (B,)
    assert top_p.dtype == uniform.dtype == torch.float64
    assert all(x is None or x.dtype == torch.int64 for x in (output_length, room, tokens))
    assert all(x is None or x.is_contiguous() for x in (top_p, uniform, output_length, room, tokens))
    top_p_search_kernel[(triton.cdiv(V, BLOCK), B)](
        logits, argmax_scratch, temperature, top_p, uniform, output_length, scratch, room, tokens,
        uniform.shape[1], V=V, DRAWS=int(tokens is not None), SLOTS=argmax_scratch.shape[1],
        BLOCK=BLOCK, CHUNK=256, PIVOTS=16, num_warps=8, PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
