"""The product of one row and a weight matrix on a CPU, in Numba: out[n] = sum_k x[k] w[n, k].

x (K,) and out (N,) are float32; w (N, K) is read in the dtype in which it is stored. A thread reads four rows
of w at a time, a quarter of the matrix apart: four streams keep more reads of memory in flight than one
stream, and more than torch.sum does. Weights are converted to float32 in registers, exactly. On 2 Zen 3
cores, torch.mv is bound by its arithmetic for bfloat16: it is as slow with weights in the L2 cache. The
threads are Numba's, which do not sleep while they wait for one another. Threads that sleep took 1.8 times as
long for all products of a token on an idle machine, and are no faster on a busy one."""

import platform
import threading
from functools import cache

import numba
import torch
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

STORED = {  # the dtype in which NumPy views each weight; all differ, so that `widened` can tell them apart
    torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16,
    torch.float8_e4m3fn: torch.uint8, torch.int8: torch.int8,
}  # fmt: skip
# Without OpenMP, Numba aborts the process when two Python threads enter a kernel at the same time.
ONE_AT_A_TIME = threading.Lock()


@cache
def converts_halves() -> bool:
    """Whether the CPU that Numba compiles for has an instruction that converts float16 to float32, which e4m3
    needs too. Without it, LLVM calls a function that does not exist in the process. x86 CPUs have had it
    since 2012, but a virtual machine may hide it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if numba.config.CPU_NAME:  # set when Numba compiles for another CPU than this one
        return numba.config.CPU_NAME != "generic" or "+f16c" in (numba.config.CPU_FEATURES or "")
    return bool(binding.get_host_cpu_features().get("f16c", False))


@intrinsic
def widened(_, value):  # a stored weight -> float32
    def generate(context, builder, signature, arguments):
        (bits,), single = arguments, ir.FloatType()
        if value == types.uint16:  # bfloat16: the upper half of a float32
            wide = builder.zext(bits, ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), single)
        if value == types.int16:  # float16
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), single)
        if value == types.uint8:  # e4m3 without NaN: shifted, its bits are a float16 of 1/256 of the value
            short = builder.shl(builder.sext(bits, ir.IntType(16)), ir.Constant(ir.IntType(16), 7))
            half = builder.bitcast(builder.and_(short, ir.Constant(ir.IntType(16), 0xBFFF)), ir.HalfType())
            return builder.fmul(builder.fpext(half, single), ir.Constant(single, 256.0))
        return builder.sitofp(bits, single) if value == types.int8 else bits

    return types.float32(value), generate


OPTIONS = {"parallel": True, "nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}


def compiled(function):
    """Machine code is cached beside this file or under the home directory. If neither can be written, each
    process compiles it again, which takes 2 s."""
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no directory can hold the cache
        return njit(**OPTIONS)(function)


@compiled
def sums(x, w, out):
    N, K = w.shape
    Q = N // 4
    for n in prange(Q):
        a = b = c = d = types.float32(0)
        for k in range(K):
            a += widened(w[n, k]) * x[k]
            b += widened(w[n + Q, k]) * x[k]
            c += widened(w[n + 2 * Q, k]) * x[k]
            d += widened(w[n + 3 * Q, k]) * x[k]
        out[n], out[n + Q], out[n + 2 * Q], out[n + 3 * Q] = a, b, c, d
    for n in range(4 * Q, N):
        a = types.float32(0)
        for k in range(K):
            a += widened(w[n, k]) * x[k]
        out[n] = a


@cache
def uncached():
    return njit(**OPTIONS)(sums.py_func)


def cpu_gemv(x: Tensor, weight: Tensor, threads: int) -> Tensor:  # (K,), (N, K) -> (N,) float32
    N, K = weight.shape
    assert x.shape == (K,), f"weight {tuple(weight.shape)} for x {tuple(x.shape)}"
    assert weight.is_contiguous()
    assert weight.dtype not in (torch.float16, torch.float8_e4m3fn) or converts_halves()
    out = torch.empty(N, dtype=torch.float32, device="cpu")
    with ONE_AT_A_TIME:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        arguments = x.float().contiguous().numpy(), weight.view(STORED[weight.dtype]).numpy(), out.numpy()
        try:
            sums(*arguments)
        except OSError:  # the disk is full, so the machine code cannot be cached
            uncached()(*arguments)
    return out
