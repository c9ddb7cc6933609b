"""Matrix products on a CPU: one table of the ways to compute a product, with the measurements that decide
among them.

A way `can` compute a product if its result is right, and `wins` if it is the fastest. The first way in the
table that can and wins is taken. All of them round once, at the end. Times are for one product of a 16384 x
2048 matrix on two cores, of Zen 3 (AVX2, reads 24.8 GB/s) and of a Xeon with AMX, unless another CPU is
named. The environment variables ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make a CPU behave like one that
lacks an instruction set."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int4
from .cpu_threads import keeping_torch_threads, threads

LARGE = 1 << 19  # values of a weight from which Numba's kernel is faster: a call costs 40 us, torch.mv's 5 us
NUMBA_ROWS = 16  # the most rows of Numba's kernel
BLOCK = 1 << 21  # values of a weight that are widened at a time: 8 MB in float32, which stay in the cache
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
    """A way to compute products: x (R, K), weight (N, K), scale (N,), bias (N,) -> (R, N). A 4-bit weight is
    (N, K // 8), with scale (N, K // 32)."""

    name: str
    can: Callable[[Product], bool]
    wins: Callable[[Product], bool]
    compute: Compute


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, numba: bool = False
) -> Tensor:
    """x @ weight^T * scale + bias in the dtype of x: (..., K), (N, K), (N,), (N,) -> (..., N). A weight with
    a scale is int8 or e4m3, or 4-bit: see int4.py."""
    rows, K, N = x.reshape(-1, x.shape[-1]), x.shape[-1], len(weight)
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = weight.is_contiguous() and not trained
    product = Product(len(rows), K, N, x.dtype, weight.dtype, bias is not None, numba, plain)
    return way(product).compute(rows, weight, scale, bias).view(*x.shape[:-1], -1)


def way(product: Product) -> Way:
    return next(way for way in WAYS if way.wins(product) and way.can(product))


def _numba_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    from .kernels.cpu_few_rows import cpu_few_rows, takes
    from .kernels.cpu_gemv import cpu_gemv

    kernel = cpu_few_rows if takes(len(x), x.dtype, weight.dtype) else cpu_gemv
    with keeping_torch_threads():  # Numba's first call changes them
        out = kernel(x, weight, threads())
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
    rows, out = x.float(), torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    for part, wide in _parts(weight, torch.float32):
        torch.mm(rows, wide.t(), out=out[:, part])
    return _finish(out, scale, bias, x.dtype)


def _in_bfloat16(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """oneDNN multiplies its float32 sums by the scale, before it rounds them."""
    assert scale is not None
    assert scale.dtype == x.dtype  # another dtype would be rounded
    rows, out = x.contiguous(), torch.empty(len(x), len(weight), dtype=x.dtype, device="cpu")
    for part, wide in _parts(weight, x.dtype):
        factors = scale[part].repeat(len(x), 1)
        out[:, part] = torch.ops.mkldnn._linear_pointwise.binary(rows, factors, wide, None, "mul")
    return out


def _four_bit_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    from .kernels.cpu_int4 import cpu_int4

    assert scale is not None
    with keeping_torch_threads():
        return cpu_int4(x, weight, scale, threads()).to(x.dtype)


def _four_bit(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The numbers of the weight are exact in float32. For products in bfloat16 they are rounded to it; the
    error of the result is then 1.3 times that of rounding it alone."""
    assert scale is not None
    (N, K), dtype = (len(weight), x.shape[1]), x.dtype if multiplies(x.dtype) else torch.float32
    rows, out = int4.reordered(x).to(dtype), torch.empty(len(x), N, dtype=x.dtype, device="cpu")
    step = min(N, max(1, BLOCK // 2 // K))  # half as many numbers, which are in the cache twice
    memory = torch.empty(step, K, dtype=torch.float32, device="cpu")
    narrow = torch.empty(step, K, dtype=dtype, device="cpu") if dtype in HALVES else None
    for n in range(0, N, step):
        part = slice(n, n + step)
        wide = int4.widened(weight[part], scale[part], memory[: len(weight[part])])
        out[:, part] = F.linear(rows, wide if narrow is None else narrow[: len(wide)].copy_(wide))
    return out


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight at a time, widened to float32 or bfloat16, in memory that the next rows reuse."""
    N, K = weight.shape
    step = min(N, max(1, BLOCK // K))
    memory = torch.empty(step, K, dtype=dtype, device="cpu")
    for n in range(0, N, step):
        part = slice(n, n + step)
        yield part, widened(weight[part], memory)


def _torch(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


# fmt: off
WAYS = (
    Way("4-bit kernel",
        lambda p: p.weight == int4.STORED and p.rows <= NUMBA_ROWS and p.plain and p.x.itemsize < 8
        and p.features % int4.GROUP == 0 and not _forked,
        lambda p: p.numba and p.features * p.outputs >= LARGE, _four_bit_kernel),
    # On Zen 5, 272 rows take 28 ms; of int8 weights 22 ms, and of bfloat16 weights 21 ms.
    Way("4-bit widened",
        lambda p: p.weight == int4.STORED and p.features % int4.GROUP == 0 and p.x.itemsize <= 4,
        lambda p: True, _four_bit),
    # One row takes the time of reading the weight. A token of PaliGemma 3B takes 225 ms on Zen 3, and with
    # torch.mv 377 ms; on Zen 5 (AVX-512), 90 ms and 290 ms. On Zen 5 at 42 GB/s, 8 rows of bfloat16 take
    # 1.2 times the time of one row, and with F.linear 1.5 times; 16 rows take 1.3 and 1.8 times. 8 rows of
    # int8 and e4m3 take 1.4 times the time of one, 16 rows 2.2 times. Limited to AVX2, the same CPU takes
    # 1.8 times for 8 rows of bfloat16, and 3.1 times for 16; 2.6 and 3.4 times for 8 rows of int8 and e4m3.
    # On a CPU with AMX, no few rows have been measured.
    Way("numba",
        lambda p: p.rows <= NUMBA_ROWS and p.plain and p.x.itemsize < 8 and p.weight.itemsize < 8
        and p.weight != int4.STORED and not _forked and _numba_converts(p.weight),
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
    # On Zen 4, 272 rows of int8 take 55 ms, widened to float32 137 ms, and of bfloat16 weights 45 ms.
    Way("in bfloat16",
        lambda p: p.x == torch.bfloat16 and p.weight.itemsize == 1 and p.plain and not p.bias
        and multiplies(p.x) and hasattr(torch.ops.mkldnn, "_linear_pointwise"),
        lambda p: True, _in_bfloat16),
    # float32 products of 8-bit weights, and of half-precision weights if the CPU has no instructions for
    # them: 272 rows at 115 GFLOP/s on Zen 3, where F.linear reaches 12 to 20 in bfloat16. Up to 8 rows,
    # F.linear is faster even there.
    Way("widened", lambda p: p.x.itemsize <= 4 and p.weight != int4.STORED,
        lambda p: p.weight != p.x or (p.x in HALVES and p.rows >= 12 and not multiplies(p.x)), _widened),
    Way("torch", lambda p: p.weight == p.x, lambda p: True, _torch),
)
# fmt: on


def _finish(out: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
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
