"""Top-p sampling, first of two kernels: the probability of each interval of the logits.

    scratch[b, bin(x[b, v])] += weight(x[b, v]);   bin(x) = min(64 (peak - x), 4095)
    weight(x) = round(2^43 exp((x - peak) / temperature))

x (B, V) float32 logits, V up to 2^19; peak is the largest logit of a row. Weights are integers, so that their
sums do not depend on the order of the additions, and a seed gives the same tokens each time. The exponential
is computed in float64. The error of a rounded weight is at most 2^-44 of the largest weight, and the error of
the sum of all at most V 2^-44 of it. A row with a NaN or an infinite logit has no weights. The peak comes
from the partial argmaxes of norm_head.py. Reads 4 V bytes per row from the L2 cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dependent, launch_dependents, wait_for_dependencies
from .norm_head import INFINITE

BINS = tl.constexpr(4096)
LENGTHS, COUNTERS, NUCLEUS = (tl.constexpr(4096 + i) for i in (0, 2, 4))  # the values of top_p_search.py
SCRATCH = tl.constexpr(4096 + 8)  # int64 values per row
SCALE = tl.constexpr(2.0**43)
MOST = 1 << 19  # the largest vocabulary: its weights sum to less than 2^63
BLOCK = 2048  # logits per program: 126 programs for a vocabulary of 257,216


@triton.jit
def peak_of(argmax_ptr, b, V: tl.constexpr, SLOTS: tl.constexpr):
    """The largest logit of a row, float32, and the number of its logits: V, or 0 if one of them is not
    finite."""
    best = tl.max(tl.load(argmax_ptr + b * SLOTS + tl.arange(0, SLOTS)), axis=0)
    bits = (best >> 32).to(tl.int32)
    length = tl.where(bits < INFINITE, V, 0)
    bits = tl.where(bits < INFINITE, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0)
    return bits.to(tl.float32, bitcast=True), length


@triton.jit
def bin_of(logits, peak):
    return tl.minimum((peak - logits) * 64, BINS - 1).to(tl.int32)


@triton.jit
def weigh(logits, peak, temperature):
    """int64 weights. The difference is computed before the division, because a tiny temperature would make
    both quotients infinite."""
    power = tl.exp((logits.to(tl.float64) - peak.to(tl.float64)) / temperature)
    return (power * SCALE + 0.5).to(tl.int64)


@triton.jit
def top_p_histogram_kernel(
    logits_ptr, argmax_ptr, temperature_ptr, scratch_ptr,
    V: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    v, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    peak, length = peak_of(argmax_ptr, b, V, SLOTS)
    logits = tl.load(logits_ptr + b * V + v, mask=v < length, other=float("-inf"))
    weights = weigh(logits, peak, tl.load(temperature_ptr + b))
    tl.atomic_add(
        scratch_ptr + b * SCRATCH + bin_of(logits, peak), weights,
        mask=(v < length) & (weights > 0), sem="relaxed",
    )  # fmt: skip


def top_p_histogram(logits: Tensor, argmax_scratch: Tensor, temperature: Tensor, scratch: Tensor) -> None:
    """logits (B, V) float32; argmax_scratch (B, slots) int64, as norm_head leaves it; temperature (B,)
    float64; scratch (B, 4104) int64 zeros. All contiguous."""
    check(logits, argmax_scratch, temperature, scratch)
    B, V = logits.shape
    top_p_histogram_kernel[(triton.cdiv(V, BLOCK), B)](
        logits, argmax_scratch, temperature, scratch,
        V=V, SLOTS=argmax_scratch.shape[1], BLOCK=BLOCK, num_warps=8, PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip


def check(logits: Tensor, argmax_scratch: Tensor, temperature: Tensor, scratch: Tensor) -> None:
    B, V = logits.shape
    assert V <= MOST
    assert argmax_scratch.shape[:1] == (B,)
    assert temperature.shape == (B,)
    assert scratch.shape == (B, SCRATCH.value)
    assert logits.dtype == torch.float32
    assert temperature.dtype == torch.float64
    assert argmax_scratch.dtype == scratch.dtype == torch.int64
    assert all(x.is_contiguous() for x in (logits, argmax_scratch, temperature, scratch))
