"""The operations of a decode step on a CPU, in Numba: what fused.py describes, for one token of each of up to
16 rows in bfloat16.

The products are those of cpu_gemv.py, cpu_few_rows.py and cpu_int4.py. What stands between them takes one
call each, instead of 8 to 20 operations of torch: after each product, the caches hold weights, and torch's
and Python's own code and data come from memory. On Zen 4, everything but the products took 25 ms of a token
of PaliGemma 3B, which takes 200 ms."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import cpu_few_rows, cpu_gemv, cpu_int4
from .cpu_between import add_rows, attend_rows, geglu_rows, norm_rows, rope_rows
from .cpu_gemv import BESIDE, run
from .cpu_vectors import LANES, STORED, converts_halves
from .cpu_workers import own_threads

MULTIPLE = 8 * LANES  # features of a vector of 4-bit weights, which are whole vectors of all others
NOTHING = np.empty(0, np.uint16)
Weight = tuple[Tensor, Tensor | None]  # and its scale


def takes(weight: torch.dtype, features: int, outputs: int) -> bool:
    known = weight in (torch.bfloat16, torch.int8, cpu_int4.WORDS)
    known = known or (weight == torch.float8_e4m3fn and converts_halves())
    return known and features % MULTIPLE == 0 and outputs % LANES == 0


def _bits(x: Tensor) -> np.ndarray:
    assert x.dtype == torch.bfloat16
    return x.view(torch.uint16).numpy()


def _products(x: Tensor, weights: Sequence[Weight], count: int) -> list[np.ndarray]:
    """For each weight, its products with x (R, K), float32 (R, N), and the scales that they lack, which may
    be none."""
    made, R = [], len(x)
    for weight, scale in weights:
        counter, dtype = np.zeros(1, np.int64), weight.dtype
        assert weight.is_contiguous()
        assert takes(dtype, x.shape[1], len(weight))
        assert weight.shape[1] * (cpu_int4.CODES if dtype == cpu_int4.WORDS else 1) == x.shape[1]
        if dtype == cpu_int4.WORDS:
            assert scale is not None
            operand, ordered, shape = cpu_int4.operands(x)
            sums = torch.empty(len(ordered), len(weight), dtype=torch.float32, device="cpu").numpy()
            ends = cpu_int4.ends_of_parts(len(weight) // len(shape[1]), count)
            stored = (weight.numpy(), _bits(scale))
            run(cpu_int4.products, operand, ordered, *stored, sums, counter, ends, count, *shape)
            made += [sums, NOTHING]
            continue
        few = cpu_few_rows.takes(R, x.dtype, dtype)
        module = cpu_few_rows if few else cpu_gemv
        operand, shape = cpu_few_rows.operand(x) if few else cpu_gemv.operand(x, dtype)
        rows = len(shape[0]) if few else len(operand)
        sums = torch.empty(rows, len(weight) + BESIDE, dtype=torch.float32, device="cpu").numpy()
        run(module.products, operand, weight.view(STORED[dtype]).numpy(), sums, counter, count, *shape)
        made += [sums, NOTHING if scale is None else _bits(scale)]
    return made


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (B, 1, E) -> (B, E)
    out = torch.empty(len(x), x.shape[2], dtype=x.dtype, device="cpu")
    run(norm_rows, _bits(x[:, 0]), _bits(weight), eps, _bits(out))
    return out


def norm_geglu(x: Tensor, norm: Tensor, eps: float, gate: Weight, up: Weight) -> Tensor:
    """gelu_tanh(gate(norm(x))) * up(norm(x)): (B, 1, E) -> (B, 1, M)."""
    out = torch.empty(len(x), 1, len(gate[0]), dtype=x.dtype, device="cpu")
    with own_threads() as count:
        run(geglu_rows, *_products(_normed(x, norm, eps), (gate, up), count), _bits(out[:, 0]), (0,) * LANES)
    return out


def norm_qkv_rope(
    x: Tensor, norm: Tensor, eps: float, projections: Sequence[Weight], rotation: Tensor, positions: Tensor,
    keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """The queries of norm(x), rotated by rotation (2, B, 1, D/2): (B, 1, E) -> (B, 1, H, D). Writes keys and
    values at positions (B, 1) of the caches (B, S, K, D)."""
    D = keys.shape[-1]
    if int(positions.max()) >= keys.shape[1]:
        raise IndexError(f"position {int(positions.max())} is not one of the {keys.shape[1]} of the cache")
    q = torch.empty(len(x), 1, len(projections[0][0]) // D, D, dtype=x.dtype, device="cpu")
    places = (rotation[:, :, 0].contiguous().numpy(), positions[:, 0].contiguous().numpy())
    caches = (_bits(_whole(keys)), _bits(_whole(values)))
    with own_threads() as count:
        products = _products(_normed(x, norm, eps), projections, count)
        run(rope_rows, *products, *places, *caches, _bits(q[:, 0]))
    return q


def attention(
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor | None, limit: Tensor, scale: float | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """ops.attention for one query of each row: (B, 1, H, D), (B, S, K, D) twice -> (B, 1, H * D). start and
    limit (B, 1): see AttentionRange."""
    out = torch.empty(len(q), 1, q.shape[2] * q.shape[3], dtype=q.dtype, device="cpu")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    last = limit[:, 0].clamp(max=keys.shape[1]).contiguous()
    first = torch.zeros_like(last) if start is None else start[:, 0].contiguous()
    caches, ranges = (_bits(_whole(keys)), _bits(_whole(values))), (first.numpy(), last.numpy())
    with own_threads():
        run(attend_rows, _bits(q[:, 0]), *caches, *ranges, scale, softcap or 0.0, _bits(out[:, 0]))
    return out


def project_add(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """residual + the product, or + its norm: (B, 1, K), (B, 1, E) -> (B, 1, E)."""
    out, post = torch.empty_like(residual), NOTHING if norm is None else _bits(norm)
    with own_threads() as count:
        products = _products(x[:, 0], (weight,), count)
        run(add_rows, *products, _bits(residual[:, 0]), post, eps, _bits(out[:, 0]))
    return out


def _whole(cache: Tensor) -> Tensor:
    """All positions of a cache (B, S, K, D), of which the first ones are given."""
    B, _, K, D = cache.shape
    return cache.as_strided((B, cache.stride(0) // (K * D), K, D), cache.stride())


def are_caches(*caches: Tensor) -> bool:
    """Whether they are the first positions of caches, each of which is contiguous as a whole."""
    for cache in caches:
        (B, S, K, D), apart = cache.shape, cache.stride(0)
        room = cache.untyped_storage().nbytes() // cache.itemsize - cache.storage_offset()
        rows = apart % (K * D) == 0 and apart >= S * K * D and B * apart <= room
        if not rows or cache.stride()[1:] != (K * D, D, 1):
            return False
    return True
