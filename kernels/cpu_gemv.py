"""One row times a weight matrix on a CPU, in Numba: out[n] = sum_k x[k] w[n, k]; x (K,), out (N,) float32; w (N, K) as it is stored.

A thread reads four rows of w at a time, a quarter of the matrix apart: four streams keep more of memory under way than one, and more
than torch.sum does. Weights become float32 in registers, exactly. On 2 Zen 3 cores torch.mv is bound by its arithmetic for bfloat16: it is
as slow with weights that lie in the L2 cache.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

STORED = {
    torch.float32: torch.float32,
    torch.float8_e4m3fn: torch.uint8,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.int8: torch.int8,
}  # what NumPy has, each another
PART = 1 << 22  # bytes of a weight that a thread takes at a time, 0.3 ms


@intrinsic
def widened(_, value):  # a stored weight -> float32
    def generate(context, builder, signature, arguments):
        (bits,), single = arguments, ir.FloatType()
        if value == types.uint16:  # the upper half of a float32
            return builder.bitcast(builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), single)
        if value == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), single)
        if value == types.uint8:  # e4m3 without NaN: the bits of a float16 of 1/256, whose exponent has one bit more, below the sign
            short = builder.shl(builder.sext(bits, ir.IntType(16)), ir.Constant(ir.IntType(16), 7))
            half = builder.bitcast(builder.and_(short, ir.Constant(ir.IntType(16), 0xBFFF)), ir.HalfType())
            return builder.fmul(builder.fpext(half, single), ir.Constant(single, 256.0))
        return builder.sitofp(bits, single) if value == types.int8 else bits

    return types.float32(value), generate


def compiled(function):
    """Machine code is kept beside this file or under the home directory; where neither can be written, each process takes 1 s to make it."""
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no directory for it
        return njit(**options)(function)


@compiled
def sums(x, w, out, first, last):
    """The outputs first .. last - 1 of each quarter; of the last quarter also what four do not divide."""
    N, K = w.shape
    Q = N // 4
    for n in range(first, last):
        a = b = c = d = types.float32(0)
        for k in range(K):
            a += widened(w[n, k]) * x[k]
            b += widened(w[n + Q, k]) * x[k]
            c += widened(w[n + 2 * Q, k]) * x[k]
            d += widened(w[n + 3 * Q, k]) * x[k]
        out[n], out[n + Q], out[n + 2 * Q], out[n + 3 * Q] = a, b, c, d
    if last == Q:
        for n in range(4 * Q, N):
            a = types.float32(0)
            for k in range(K):
                a += widened(w[n, k]) * x[k]
            out[n] = a


@cache
def helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "gemv")


def cpu_gemv(x: Tensor, weight: Tensor) -> Tensor:  # (K,), (N, K) -> (N,) float32
    """By as many threads as torch has. These sleep when there is nothing to do: a second pool that spins, as Numba's own, would take the
    cores from torch's, and on a machine with other work each call would wait for a thread that does not run."""
    N, K = weight.shape
    assert x.shape == (K,), f"weight {tuple(weight.shape)} for x {tuple(x.shape)}"
    assert weight.is_contiguous()
    out, threads, Q = torch.empty(N), torch.get_num_threads(), N // 4
    arrays = x.float().contiguous().numpy(), weight.view(STORED[weight.dtype]).numpy(), out.numpy()
    step = max(1, -(-Q // max(threads, min(16 * threads, weight.nbytes // PART))))
    parts = iter(range(0, max(Q, 1), step))  # whoever is free takes the next one

    def work() -> None:
        for first in parts:
            sums(*arrays, first, min(first + step, Q))

    others = [helpers(threads - 1).submit(work) for _ in range(threads - 1)] if Q > 1 else []
    work()
    for other in others:
        other.result()
    return out
