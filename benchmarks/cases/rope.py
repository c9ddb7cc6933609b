"""rope: the rotary position embedding of queries and keys, and the write of keys and values to the cache."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from paligemma.kernels.rope import rope

from .case import Case, compiled


def rope_case(shape: str, B: int, T: int, heads: tuple[int, int, int], capacity: int | None = None) -> Case:
    """Rows begin at different positions of a cache of `capacity` positions (None: T + 300)."""
    (H, K, D), S = heads, capacity or T + 300

    def make(device, dtype):
        q, k, v = (torch.randn(B, T, n, D, device=device, dtype=dtype) for n in (H, K, K))
        starts = [(S - T) * (b + 1) // B for b in range(B)]
        positions = torch.tensor([[start + t for t in range(T)] for start in starts], device=device)
        frequency = 10000 ** (-torch.arange(D // 2, dtype=torch.float64, device=device) * 2 / D)
        angle = positions[:, :, None].double() * frequency
        rotation = torch.stack([angle.cos(), angle.sin()]).float()
        caches = (torch.randn(B, S, K, D, device=device, dtype=dtype) for _ in range(2))
        return q, k, v, rotation, positions, *caches

    peers: dict[str, Callable[[], Callable]] = {"torch.compile": lambda: compiled(plain_rope)}
    if find_spec("liger_kernel"):
        peers["Liger-Kernel + index_put"] = liger_rope
    return Case(
        "rope", shape, f"H {H} K {K} D {D}{' T 1' * (T == 1)}", make, run_rope, plain_rope, exact_rope,
        lambda itemsize: B * T * (2 * itemsize * D * (H + 2 * K) + 4 * D + 8), peers=peers,
    )  # fmt: skip


def run_rope(q, k, v, rotation, positions, k_cache, v_cache):
    return rope(q, k, v, rotation, positions, k_cache, v_cache), k_cache, v_cache


def plain_rope(q, k, v, rotation, positions, k_cache, v_cache):
    row = torch.arange(len(q), device=q.device)[:, None]
    k_cache[row, positions] = turned(k.float(), rotation).to(k.dtype)
    v_cache[row, positions] = v
    return turned(q.float(), rotation).to(q.dtype), k_cache, v_cache


def exact_rope(q, k, v, rotation, positions, k_cache, v_cache):
    row = torch.arange(len(q), device=q.device)[:, None]
    keys, values = k_cache.double(), v_cache.double()
    keys[row, positions] = turned(k.double(), rotation.double())
    values[row, positions] = v.double()
    return turned(q.double(), rotation.double()), keys, values


def turned(x: Tensor, rotation: Tensor) -> Tensor:  # (B, T, H, D), (2, B, T, D/2) of one dtype
    """x after the rotation by the angles whose cosines and sines are rotation[0] and rotation[1]."""
    cos, sin = rotation[:, :, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def liger_rope():
    """Liger-Kernel rotates q and k in place and does not write the cache: torch writes it afterwards."""
    from liger_kernel.ops.rope import rope_forward  # pyright: ignore[reportMissingImports]

    def run(q, k, v, rotation, positions, k_cache, v_cache):
        row = torch.arange(len(q), device=q.device)[:, None]
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k, *_ = rope_forward(q, k, *rotation, rotary_dim=q.shape[-1])
        k_cache[row, positions] = k.transpose(1, 2)
        v_cache[row, positions] = v
        return q.transpose(1, 2), k_cache, v_cache

    return run
