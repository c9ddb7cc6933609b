"""Matrix products on a CPU: one table of the ways to compute one, and what decided between them.

A way may be taken where it `can` compute a product rightly, and is taken where it `wins`: the first such way
of the table. All of them round once, at the end. Times are milliseconds for one product of a 16384 x 2048
matrix on two cores: Zen 3 (AVX2, reads 24.8 GB/s) and a Xeon with AMX unless another CPU is named. A CPU
without an instruction set imitates one that lacks it: ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA."""

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

LARGE = (
    1 << 19
)  # values of a weight from which Numba's kernel is the faster: a call takes it 40 us, torch.mv 5
BLOCK = 1 << 22  # float32 values of a weight that are widened at a time: 16 MB, which stays in the cache
HALVES = (torch.bfloat16, torch.float16)


class Product(NamedTuple):
    """What a product is, as far as the choice of its way depends on it."""

    rows: int  # of x
    features: int  # of x and of each row of the weight
    outputs: int
    x: torch.dtype
    weight: torch.dtype
    bias: bool = False
    numba: bool = False  # whether the backend numba was asked for
    plain: bool = True  # a contiguous weight, and no gradient is wanted


class Way(NamedTuple):
    name: str
    can: Callable[[Product], bool]
    wins: Callable[[Product], bool]
    compute: Callable[
        [Tensor, Tensor, Tensor | None, Tensor | None], Tensor
    ]  # (R, K), (N, K), scale (N,), bias (N,) -> (R, N)


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, numba: bool = False
) -> Tensor:
    """x @ weight^T * scale + bias in the dtype of x: (..., K), (N, K), (N,), (N,) -> (..., N). A weight with
    a scale is int8 or e4m3."""
    rows = x.reshape(-1, x.shape[-1])
    plain = weight.is_contiguous() and not (
        torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    )
    chosen = way(
        Product(len(rows), x.shape[-1], len(weight), x.dtype, weight.dtype, bias is not None, numba, plain)
    )
    return chosen.compute(rows, weight, scale, bias).view(*x.shape[:-1], -1)


def way(product: Product) -> Way:
    return next(way for way in WAYS if way.wins(product) and way.can(product))


def _numba_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    from .kernels.cpu_gemv import cpu_gemv

    before = torch.get_num_threads()
    out = cpu_gemv(x.flatten(), weight, threads())[None]
    if torch.get_num_threads() != before and (
        library := _openmp()
    ):  # Numba's first call sets the number of the OpenMP that both use
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
    # One row is bound by the reading of the weight. PaliGemma 3B, ms a token: Zen 3 225 for 377 of torch.mv;
    # Zen 5 (AVX-512) 90 for 290.
    Way("numba", lambda p: p.rows == 1 and p.plain and p.x.itemsize < 8 and p.weight.itemsize < 8 and not _forked and _numba_converts(p.weight),
        lambda p: p.numba and p.features * p.outputs >= LARGE, _numba_kernel),
    # torch's int8 kernel reads past the ends of rows, or leaves their ends out, unless K is a multiple of its
    # vectors: 8 values on AVX2, 32 on AVX-512. PaliGemma 2 3B, ms a token, Zen 3: 276, for 410 in bfloat16.
    # Widened weights are faster from 4 rows on.
    Way("int8 kernel", lambda p: p.x == torch.bfloat16 and p.weight == torch.int8 and not p.bias and p.features % 32 == 0 and p.plain,
        lambda p: p.rows < 4, _int8_kernel),
    # Of bfloat16 weights F.linear reads 20 GB/s and mv 25, with AVX2 and with AMX.
    Way("mv", lambda p: p.rows == 1 and p.weight == p.x and not p.bias, lambda p: p.x in HALVES, _mv),
    # float32 products of 8-bit weights, and of half-precision ones where the CPU has no instructions for
    # them: 272 rows at 115 GFLOP/s on Zen 3, where F.linear makes 12 to 20 in bfloat16. Up to 8 rows F.linear
    # is the faster even there.
    Way("widened", lambda p: p.x.itemsize <= 4, lambda p: p.weight != p.x or (p.x in HALVES and p.rows >= 12 and not multiplies(p.x)), _widened),
    Way("torch", lambda p: p.weight == p.x, lambda p: True, _torch),
)
# fmt: on


def _finish(out: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = out if scale is None else out * scale.float()
    return (out if bias is None else out + bias.float()).to(dtype)


def to_float(weight: Tensor) -> Tensor:
    """Exactly. The bits of an e4m3 number that is not NaN are those of a float16 number of 1/256 of it: 1.1
    ns a value on a Zen 3 core, where torch's conversion takes 4.8."""
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    return (
        weight.view(torch.int8)
        .to(torch.int16)
        .bitwise_left_shift_(7)
        .bitwise_and_(-0x4001)
        .view(torch.float16)
        .float()
        .mul_(256)
    )


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a matrix product for bfloat16 or float16 that this CPU has instructions for: bfloat16
    with AVX-512 and AMX, float16 with AVX512-FP16 and AMX."""
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")):
        return False
    supported = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    if not supported():
        return False
    x = torch.ones(16, 64, dtype=dtype, device="cpu")
    try:  # where ONEDNN_MAX_CPU_ISA hides instructions, torch counts on them all the same
        return bool((F.linear(x, x) == 64).all())
    except RuntimeError:
        return False


def numba_fault() -> str | None:
    """Why Numba's kernel cannot be had, if it cannot."""
    try:
        from numba import config

        from .kernels import cpu_gemv  # noqa: F401
    except Exception as error:  # it fails in many ways beside a NumPy or a Python that it does not know
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "NUMBA_DISABLE_JIT is set" if getattr(config, "DISABLE_JIT", 0) else None


_forked = False  # in a child of a process whose OpenMP threads it has not inherited


def _after_fork() -> None:
    global _forked
    _forked = "paligemma.kernels.cpu_gemv" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Threads. An operation of a few microseconds on two threads waits for the slower of them, and where a core
# has other work, that is milliseconds: a token of the demo model took 220 to 340 ms beside one busy process
# on two Zen 5 cores, 3.4 ms on one thread.

_outside = threading.local()  # .count: the threads that this thread has outside of `one_thread`


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's operations in this block, of this Python thread alone, run on one thread; `threads` still says
    how many there are outside.

    OpenMP keeps the number for each thread, and torch asks OpenMP: torch.set_num_threads would change it for
    other threads too. Where torch has no such OpenMP (on Windows and macOS), nothing is changed."""
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
    """How many threads this Python thread may compute with."""
    return getattr(_outside, "count", None) or torch.get_num_threads()


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch uses, if its number of threads can be set for one thread."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads  # noqa: B018  whether it is there
    except (OSError, TypeError, AttributeError):
        return None
    return library if "OpenMP" in torch.__config__.parallel_info() else None
