"""Matrix products on a CPU: one table of the ways to compute a product, with the measurements that decide
among them. The choice for attention follows the table.

A way `can` compute a product if its result is right, and `wins` if it is the fastest. The first way in the
table that can and wins is taken. All of them round once, at the end, but for bfloat16 rows that become whole
numbers: see kernels/cpu_operand.py. Times are for one product of a 16384 x
2048 matrix on two cores, of Zen 3 (AVX2, reads 24.8 GB/s) and of a Xeon with AMX, unless another CPU is
named. The environment variables ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make torch behave as if the CPU
lacked an instruction set; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES do so for Numba."""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int4, torch_ops
from .attention_range import AttentionRange
from .cpu_blocks import finish, four_bit, in_bfloat16, in_float32
from .cpu_instructions import has_avx512, in_avx512, multiplies

LARGE = 1 << 19  # values of a weight from which Numba's kernel is faster: a call costs 40 us, torch.mv's 5 us
NUMBA_ROWS = 16  # the most rows of Numba's kernels for few rows
# Multiplications of queries and keys from which Numba's attention is faster. On Zen 4, 1 << 20 take 0.18 ms,
# and with torch 0.15 ms; 17 tokens of PaliGemma 3B and 268 keys, which are 9 << 20, take 0.27 and 0.40 ms.
LARGE_ATTENTION = 1 << 21
MANY_ROWS = "many rows"  # the way that computes a GELU or GeGLU with the products
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


Weight = tuple[Tensor, Tensor | None]  # and its scale
Compute = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class Way(NamedTuple):
    """A way to compute products: x (R, K), weight (N, K), scale (N,), bias (N,) -> (R, N). A 4-bit weight is
    (N, K // 8), with scale (N, K // 32)."""

    name: str
    can: Callable[[Product], bool]
    wins: Callable[[Product], bool]
    compute: Compute


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *,
    gelu: bool = False, numba: bool = False,
) -> Tensor:  # fmt: skip
    """x @ weight^T * scale + bias in the dtype of x, or gelu_tanh of it: (..., K), (N, K), (N,), (N,) ->
    (..., N). A weight with a scale is int8 or e4m3, or 4-bit: see int4.py."""
    rows = x.reshape(-1, x.shape[-1])
    chosen = way(_product(rows, weight, scale, bias, numba))
    if gelu and chosen.name == MANY_ROWS:
        y = _many_rows(rows, weight, scale, bias, gelu=True)
    else:
        y = chosen.compute(rows, weight, scale, bias)
        y = torch_ops.gelu_tanh(y) if gelu else y
    return y.view(*x.shape[:-1], len(weight))


def linear_geglu(x: Tensor, gate: Weight, up: Weight, *, numba: bool = False) -> Tensor:
    """gelu_tanh(gate product) * up product: (..., K) -> (..., N)."""
    rows = x.reshape(-1, x.shape[-1])
    ways = [way(_product(rows, *weight, None, numba)).name for weight in (gate, up)]
    if ways == [MANY_ROWS, MANY_ROWS] and gate[0].dtype == up[0].dtype:
        return _many_rows(rows, *gate, None, up=up).view(*x.shape[:-1], -1)
    return torch_ops.geglu(*(linear(x, *weight, numba=numba) for weight in (gate, up)))


def _trained(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _product(rows: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, numba: bool) -> Product:
    plain = weight.is_contiguous() and not _trained(rows, weight, scale, bias)
    R, K = rows.shape
    return Product(R, K, len(weight), rows.dtype, weight.dtype, bias is not None, numba, plain)


def way(product: Product) -> Way:
    return next(way for way in WAYS if way.wins(product) and way.can(product))


def _numba_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    from .kernels import cpu_few_rows, cpu_gemv, cpu_int8

    kernel = cpu_gemv.cpu_gemv
    if cpu_few_rows.takes(len(x), x.dtype, weight.dtype):
        kernel = cpu_few_rows.cpu_few_rows
    elif cpu_int8.takes(x.dtype, weight.dtype):
        kernel = cpu_int8.cpu_int8
    return finish(kernel(x, weight), scale, bias, x.dtype)


def _numba_converts(weight: torch.dtype) -> bool:
    from .kernels.cpu_gemv import converts_halves

    return weight not in (torch.float16, torch.float8_e4m3fn) or converts_halves()


def _takes_many_rows(p: Product) -> bool:
    if not p.plain or _forked:
        return False
    from .kernels.cpu_many_rows import takes

    return takes(p.x, p.weight, p.features, p.outputs)


def _many_rows(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *,
    gelu: bool = False, up: Weight | None = None,
) -> Tensor:  # fmt: skip
    from .kernels.cpu_many_rows import cpu_many_rows

    return cpu_many_rows(x, weight, scale, bias, gelu=gelu, up=up)


def _int8_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    assert scale is not None
    return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scale)


def _mv(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.mv(weight, x.flatten())[None]


def _four_bit_kernel(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    from .kernels.cpu_int4 import cpu_int4

    assert scale is not None
    return finish(cpu_int4(x, weight, scale), None, bias, x.dtype)


def _torch(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


# fmt: off
WAYS = (
    Way("4-bit kernel",
        lambda p: p.weight == int4.STORED and p.rows <= NUMBA_ROWS and p.plain and p.x.itemsize < 8
        and p.features % int4.GROUP == 0 and not _forked,
        lambda p: p.numba and p.features * p.outputs >= LARGE, _four_bit_kernel),
    # On Zen 4 (AVX-512), 272 rows take 44 ms, of 8-bit weights too, 46 ms of 4-bit weights; of bfloat16
    # weights 46 ms with F.linear. On Ice Lake, whose AVX-512 lacks bfloat16, they take 66 to 75 ms in any
    # format; of bfloat16 weights 138 ms widened, and 328 ms with F.linear.
    Way(MANY_ROWS, _takes_many_rows,
        lambda p: p.numba and p.rows > NUMBA_ROWS and p.features * p.outputs >= LARGE, _many_rows),
    # On Zen 5, 272 rows take 28 ms; of int8 weights 22 ms, and of bfloat16 weights 21 ms.
    Way("4-bit widened",
        lambda p: p.weight == int4.STORED and p.features % int4.GROUP == 0 and p.x.itemsize <= 4,
        lambda p: True, four_bit),
    # One row takes the time of reading the weight. A token of PaliGemma 3B takes 225 ms on Zen 3, and with
    # torch.mv 377 ms. On Zen 5 at 42 GB/s, 8 rows of bfloat16 take 1.2 times the time of one row, of int8 and
    # e4m3 1.4 times; on Ice Lake, which lacks bfloat16, 1.7 and 2.4 times. With AMX, none were measured.
    Way("numba",
        lambda p: p.rows <= NUMBA_ROWS and p.plain and p.x.itemsize < 8 and p.weight.itemsize < 8
        and p.weight != int4.STORED and not _forked and _numba_converts(p.weight),
        lambda p: p.numba and p.features * p.outputs >= LARGE, _numba_kernel),
    # Unless K is a multiple of its vectors (8 values on AVX2, 32 on AVX-512), torch's int8 kernel reads past
    # the ends of rows, or omits their ends. From 4 rows on, widened weights are faster with AVX2. On Zen 4,
    # 4 rows take 2.4 ms and widened 34 ms, 64 rows 35 and 47 ms, 272 rows 152 and 122 ms. On Ice Lake, 32
    # rows of a 4096 x 2048 matrix take 5.9 and 7.2 ms, 64 rows 13 and 11 ms.
    Way("int8 kernel",
        lambda p: p.x == torch.bfloat16 and p.weight == torch.int8 and not p.bias
        and p.features % 32 == 0 and p.plain,
        lambda p: p.rows < (65 if multiplies(p.x) else 33 if has_avx512() else 4), _int8_kernel),
    # F.linear reads bfloat16 weights at 20 GB/s, mv at 25 GB/s, with AVX2 and with AMX. On Zen 4, which has
    # bfloat16 in AVX-512, mv reads at 10 GB/s and F.linear at 18.
    Way("mv", lambda p: p.rows == 1 and p.weight == p.x and not p.bias,
        lambda p: p.x in HALVES and not (p.x == torch.bfloat16 and in_avx512()), _mv),
    # On Zen 4, 272 rows of int8 take 55 ms, widened to float32 137 ms, and of bfloat16 weights 45 ms.
    Way("in bfloat16",
        lambda p: p.x == torch.bfloat16 and p.weight.itemsize == 1 and p.plain and not p.bias
        and multiplies(p.x) and hasattr(torch.ops.mkldnn, "_linear_pointwise"),
        lambda p: True, in_bfloat16),
    # float32 products of 8-bit weights, and of half-precision weights if the CPU has no instructions for
    # them: 272 rows at 115 GFLOP/s on Zen 3, where F.linear reaches 12 to 20 in bfloat16. Up to 8 rows,
    # F.linear is faster even there.
    Way("widened", lambda p: p.x.itemsize <= 4 and p.weight != int4.STORED,
        lambda p: p.weight != p.x or (p.x in HALVES and p.rows >= 12 and p.plain and not multiplies(p.x)),
        in_float32),
    Way("torch", lambda p: p.weight == p.x, lambda p: True, _torch),
)
# fmt: on


def attends(q: Tensor, k: Tensor, v: Tensor, visible: AttentionRange | None, scale: float | None) -> bool:
    """Whether the Numba kernel computes ops.attention of these, and is the fastest. It has no masks."""
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    masked = visible is not None and not visible.everything
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    large = T * (H // K) > NUMBA_ROWS and B * T * H * S * D >= LARGE_ATTENTION
    whole = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype and (scale is None or scale > 0)
    if masked or trained or not large or not whole or _forked:
        return False
    from .kernels.cpu_attention import takes

    return takes(q.dtype, D)


def numba_fault() -> str | None:
    """Why Numba's kernel is not available; None if it is."""
    try:
        from numba import config

        from .kernels import cpu_gemv  # noqa: F401
    except Exception as error:  # an unsupported NumPy or Python makes it fail in many ways
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "NUMBA_DISABLE_JIT is set" if getattr(config, "DISABLE_JIT", 0) else None


def kernels_run() -> bool:
    """Whether the Numba kernels run in this process."""
    return not _forked and numba_fault() is None


_forked = False  # whether this process is the child of one with OpenMP threads, which it has not inherited


def _after_fork() -> None:
    global _forked
    _forked = "paligemma.kernels.cpu_gemv" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
