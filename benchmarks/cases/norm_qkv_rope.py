"""norm_qkv_rope: norm, the projections to q, k and v, RoPE and the write to the cache, of a decode."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from paligemma.kernels.norm_qkv_rope import norm_qkv_rope

from .case import Case
from .gemv import Products
from .rope import exact_rope, plain_rope


def qkv_case(
    shape: str, R: int, E: int, heads: tuple[int, int, int], post: bool, quantize: str | None
) -> Case:
    """Each row is a sequence. The sequences decode at different positions of a cache."""
    (H, K, D), S = heads, 320
    given = Products(R, E, (H + 2 * K) * D, post, quantize)

    def make(device, dtype):
        positions = torch.tensor([[(S - 1) * (r + 1) // R] for r in range(R)], device=device)
        frequency = 10000 ** (-torch.arange(D // 2, dtype=torch.float64, device=device) * 2 / D)
        angle = positions[:, :, None].double() * frequency
        caches = (torch.randn(R, S, K, D, device=device, dtype=dtype) for _ in range(2))
        return *given.make(device, dtype), torch.stack([angle.cos(), angle.sin()]).float(), positions, *caches

    def run(*inputs: Tensor):
        rows, weight, scale, (rotation, positions, k_cache, v_cache) = given.read(*inputs)
        return *norm_qkv_rope(rows, weight, scale, rotation, positions, k_cache, v_cache), k_cache, v_cache

    def finish(turn: Callable, y: Tensor, x: Tensor, rest: list[Tensor]):
        q, k, v = (part.unflatten(-1, (1, -1, D)) for part in y.split([H * D, K * D, K * D], dim=-1))
        q, k_cache, v_cache = turn(q, k, v, *rest)
        return q, x, k_cache, v_cache

    return Case(
        "norm_qkv_rope", shape, f"{given.variant} heads {heads}", make, run,
        lambda *inputs: finish(plain_rope, *given.plain(*inputs)),
        lambda *inputs: finish(exact_rope, *given.exact(*inputs)),
        partial(given.bytes, outputs=given.N), chip=given.chip, weights=given.weights,
    )  # fmt: skip
