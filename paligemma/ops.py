"""One function an operation: what the model files are written in. x is (..., features); arithmetic is float32 inside,
rounded once to x's dtype at the end, whatever the dtype of the weights.
"""

import math
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WIDENED = 1 << 22  # float32 values of a weight that are made at a time on a CPU: 16 MB, which stays in its cache


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., in), (out, in) -> (..., out)
    if x.device.type == "cpu" and x.dtype != torch.float32:
        rows = x.numel() // x.shape[-1]
        if rows == 1:  # F.linear of one row reads the weights at 20 GB/s where mv reads 25 (2 cores with AMX)
            out = torch.mv(weight, x.flatten())
            return (out if bias is None else out + bias).view(*x.shape[:-1], -1)
        if rows >= 12 and not _cpu_multiplies_halves():
            return _linear_widened(x, weight, bias)
    return F.linear(x, weight, bias)


def _linear_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in float32, for CPUs without half-precision matrix instructions: six times as fast there as in bfloat16."""
    (N, K), rows = weight.shape, x.reshape(-1, x.shape[-1]).float()
    out = torch.empty(len(rows), N)
    step = max(1, WIDENED // K)
    for n in range(0, N, step):
        torch.mm(rows, weight[n : n + step].float().t(), out=out[:, n : n + step])
    return (out if bias is None else out + bias.float()).to(x.dtype).view(*x.shape[:-1], N)


@cache
def _cpu_multiplies_halves() -> bool:
    """Whether torch has a matrix product for bfloat16 and float16 on this CPU that deserves the name."""
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))


def embed(input_ids: Tensor, weight: Tensor) -> Tensor:  # (B, T), (V, E) -> (B, T, E)
    """Rows of the table times sqrt(E)."""
    rows = F.embedding(input_ids, weight)
    return (rows.float() * math.sqrt(weight.shape[1])).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's: x / sqrt(mean(x^2) + eps) * (1 + weight)."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (h * (1 + weight.float())).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up."""
    return (F.gelu(gate.float(), approximate="tanh") * up.float()).to(gate.dtype)


@lru_cache(maxsize=8)
def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:  # -> (2, length, D/2)
    """cos and sin of position * theta^(-2i/D): float32, made in float64, because an angle is as large as the position."""
    frequency = theta ** (-torch.arange(head_dim // 2, dtype=torch.float64, device=device) * 2 / head_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).float()


def rope(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """Turn q (B, T, H, D) and k (B, T, K, D) by the cos and sin of rotation (2, B, T, D/2); write k and v at positions (B, T)
    of the caches (B, S, K, D); return the turned q."""
    cos, sin = rotation[:, :, :, None]  # (B, T, 1, D/2) each
    turned = _rotate(torch.cat([q, k], dim=2), cos, sin)
    row = torch.arange(len(q), device=q.device)[:, None]
    k_cache[row, positions] = turned[:, :, q.shape[2] :]
    v_cache[row, positions] = v
    return turned[:, :, : q.shape[2]]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attention_limit(positions: Tensor, prefix: Tensor) -> Tensor:  # (B, T), (B,) -> (B, T)
    """How many positions each query sees, the first ones of its row: its whole prefix, or itself and all before it."""
    return torch.maximum(prefix[:, None], positions + 1)


def attention(q: Tensor, k: Tensor, v: Tensor, limit: Tensor) -> Tensor:
    """Query t of row b sees the first limit[b, t] positions; query head h reads key/value head h // (H/K).

    q (B, T, H, D); k, v (B, S, K, D); limit (B, T) -> (B, T, H * D)"""
    S = k.shape[1]
    everything = bool((limit >= S).all())
    return _softmax_qkv(q, k, v, None if everything else torch.arange(S, device=q.device) < limit[:, :, None])


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, P, H, D) three times -> (B, P, H * D)
    """Every query sees every key."""
    return _softmax_qkv(q, k, v, None)


def _softmax_qkv(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The G heads of a key head as rows beside the tokens: keys are read once for all of them, ten times as fast on a CPU
    for one token of PaliGemma as a copy of the keys for each head."""
    (_, T, H, _), K = q.shape, k.shape[2]
    rows = q.unflatten(2, (K, H // K)).transpose(1, 2).flatten(2, 3)  # (B, K, T * G, D)
    if mask is not None:  # (B, T, S) -> (B, 1, T * G, S)
        mask = mask.repeat_interleave(H // K, dim=1)[:, None]
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.unflatten(2, (T, H // K)).transpose(1, 2).flatten(2)
