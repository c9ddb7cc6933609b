"""Matrix products on a CPU: one table of the ways to compute a product, with the measurements that decide
among them.

A way `can` compute a product if its result is right, and `wins` if it is the fastest. The first way in the
table that can and wins is taken. All of them round once, at the end. Times are for one product of a 16384 x
2048 matrix on two cores, of Zen 3 (AVX2, reads 24.8 GB/s) and of a Xeon with AMX, unless another CPU is
named. The environment variables ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make a CPU behave like one that
lacks an instruction set."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1 << 19  # values of a weight from which Numba's kernel is faster: a call costs 40 us, torch.mv's 5 us
NUMBA_ROWS = 16  # the most rows of Numba's kernel
BLOCK = 1 << 22  # values of a weight that are widened at a time: 16 MB in float32, which stay in the cache
HALVES = (torch.bfloat16, torch.float16)


class Product(NamedTuple):
    """The properties of a product that decide how it is computed."""

    rows: int  # of x
    features: int  # of x, and of each row of the weight
    outputs: int
    x: torch.dtype
    weight: torch.dtype
    bias: bool = False
    numba: bool = False  # whether the backend is numba
    plain: bool = True  # the weight is contiguous, and no gradient is wanted


Compute = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class Way(NamedTuple):
    """A way to compute products: x (R, K), weight (N, K), scale (N,), bias (N,) -> (R, N)."""

    name: str
    can: Callable[[Product], bool]
    wins: Callable[[Product], bool]
    compute: Compute


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, numba: bool = False
) -> Tensor:
    """x @ weight^T * scale + bias in the dtype of x: (..., K), (N, K), (N,), (N,) -> (..., N). A weight with
    a scale is int8 or e4m3."""
    rows, K, N = x.reshape(-1, x.shape[-1]), x.shape[-1], len(weight)
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = weight.is_contiguous() and not trained
    product = Product(len(rows), K, N, x.dtype, weight.dtype, bias is not None, numba, plain)
    return way(product).compute(rows, weight, scale, bias).view(*x.shape[:-1], -1)


def way(product: Product) -> Way:
    return next(way for way in WAYS if way.wins(product) and way.can(product))


def _numba_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    from .kernels.cpu_gemv import cpu_gemv

    before = torch.get_num_threads()
    out = cpu_gemv(x, weight, threads())
    # Numba's first call changes the number of threads of the OpenMP library that torch uses too.
    if torch.get_num_threads() != before and (library := _openmp()):
        library.omp_set_num_threads(before)
    return _finish(out, scale, bias, x.dtype)


def _numba_converts(weight: torch.dtype) -> bool:
    from .kernels.cpu_gemv import converts_halves

    return weight not in (torch.float16, torch.float8_e4m3fn) or converts_halves()


def _int8_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    assert scale is not None
    return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scale)


def _mv(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.mv(weight, x.flatten())[None]


def _widened(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    (N, K), rows = weight.shape, x.float()
    out = torch.empty(len(rows), N, dtype=torch.float32, device="cpu")
    step = max(1, BLOCK // K)
    for n in range(0, N, step):
        torch.mm(rows, to_float(weight[n : n + step]).t(), out=out[:, n : n + step])
    return _finish(out, scale, bias, x.dtype)


def _torch(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


# fmt: off
WAYS = (
    # One row takes the time of reading the weight. A token of PaliGemma 3B takes 225 ms on Zen 3, and with
    # torch.mv 377 ms; on Zen 5 (AVX-512), 90 ms and 290 ms. On Zen 4, 8 rows of bfloat16 take 1.3 times the
    # time of one, and F.linear 1.8 times; as on AVX2, 1.8 times and 6 times. 16 rows take 1.9 and 2.4 times,
    # as on AVX2 3.3 and 10 times. Of int8 and e4m3, 8 rows take 2.6 and 3.3 times the time of one.
    Way("numba",
        lambda p: p.rows <= NUMBA_ROWS and p.plain and p.x.itemsize < 8 and p.weight.itemsize < 8
        and not _forked and _numba_converts(p.weight),
        lambda p: p.numba and p.features * p.outputs >= LARGE, _numba_kernel),
    # Unless K is a multiple of its vectors (8 values on AVX2, 32 on AVX-512), torch's int8 kernel reads past
    # the ends of rows, or omits their ends. A token of PaliGemma 2 3B takes 276 ms on Zen 3, and 410 ms in
    # bfloat16. From 4 rows on, widened weights are faster with AVX2. On Zen 4 (AVX-512), 4 rows take 2.4 ms
    # and widened 34 ms, 16 rows 9 ms and 34 ms, 64 rows 35 ms and 47 ms, 272 rows 152 ms and 122 ms.
    Way("int8 kernel",
        lambda p: p.x == torch.bfloat16 and p.weight == torch.int8 and not p.bias
        and p.features % 32 == 0 and p.plain,
        lambda p: p.rows < (65 if multiplies(p.x) else 4), _int8_kernel),
    # F.linear reads bfloat16 weights at 20 GB/s, mv at 25 GB/s, with AVX2 and with AMX. On Zen 4, which has
    # bfloat16 in AVX-512, mv reads at 10 GB/s and F.linear at 18.
    Way("mv", lambda p: p.rows == 1 and p.weight == p.x and not p.bias,
        lambda p: p.x in HALVES and not (p.x == torch.bfloat16 and _in_avx512()), _mv),
    # float32 products of 8-bit weights, and of half-precision weights if the CPU has no instructions for
    # them: 272 rows at 115 GFLOP/s on Zen 3, where F.linear reaches 12 to 20 in bfloat16. Up to 8 rows,
    # F.linear is faster even there.
    Way("widened", lambda p: p.x.itemsize <= 4,
        lambda p: p.weight != p.x or (p.x in HALVES and p.rows >= 12 and not multiplies(p.x)), _widened),
    Way("torch", lambda p: p.weight == p.x, lambda p: True, _torch),
)
# fmt: on


def _finish(out: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = out if scale is None else out * scale.float()
    return (out if bias is None else out + bias.float()).to(dtype)


def to_float(weight: Tensor) -> Tensor:
    """A weight in float32, exactly. The bits of an e4m3 number that is not NaN, moved to their places in a
    float16, are 1/256 of that number. This takes 1.1 ns a value on a Zen 3 core, where torch's conversion
    takes 4.8 ns."""
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    bits = weight.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).float().mul_(256)


@cache
def _in_avx512() -> bool:
    """Whether torch multiplies bfloat16 matrices by AVX-512, without AMX."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and multiplies(torch.bfloat16)


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype, bfloat16 or float16, by instructions of this CPU:
    bfloat16 with AVX-512 and AMX, float16 with AVX512-FP16 and AMX."""
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")):
        return False
    mkldnn, short = torch.ops.mkldnn, dtype == torch.bfloat16
    if not (mkldnn._is_mkldnn_bf16_supported() if short else mkldnn._is_mkldnn_fp16_supported()):
        return False
    x = torch.ones(16, 64, dtype=dtype, device="cpu")
    try:  # torch relies on the instructions even if ONEDNN_MAX_CPU_ISA hides them
        return bool((F.linear(x, x) == 64).all())
    except RuntimeError:
        return False


def numba_fault() -> str | None:
    """Why Numba's kernel is not available; None if it is."""
    try:
        from numba import config

        from .kernels import cpu_gemv  # noqa: F401
    except Exception as error:  # an unsupported NumPy or Python makes it fail in many ways
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "NUMBA_DISABLE_JIT is set" if getattr(config, "DISABLE_JIT", 0) else None


_forked = False  # whether this process is the child of one with OpenMP threads, which it has not inherited


def _after_fork() -> None:
    global _forked
    _forked = "paligemma.kernels.cpu_gemv" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Threads. An operation of a few microseconds on two threads waits for the slower thread. If another process
# keeps a core busy, the wait takes milliseconds: on two Zen 5 cores of which one was busy, a token of the
# demo model took 220 to 340 ms on two threads, and 3.4 ms on one.

_outside = threading.local()  # .count: the threads that this Python thread has outside of `one_thread`


@contextmanager
def one_thread() -> Iterator[None]:
    """In this block, the torch operations of this Python thread run on one thread. `threads` still returns
    the number outside of the block.

    OpenMP has a number for each Python thread, and torch uses it; torch.set_num_threads would change the
    number of other Python threads too. If torch does not use such an OpenMP (on Windows and macOS), the block
    changes nothing."""
    library, count = _openmp(), torch.get_num_threads()
    if library is None or count == 1:
        yield
        return
    _outside.count = count
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(count)
        del _outside.count


def threads() -> int:
    """The number of threads on which this Python thread may compute."""
    return getattr(_outside, "count", None) or torch.get_num_threads()


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch uses, if its number of threads can be set for one Python thread alone."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads  # noqa: B018  raises AttributeError if it does not exist
    except (OSError, TypeError, AttributeError):
        return None
    return library if "OpenMP" in torch.__config__.parallel_info() else None
