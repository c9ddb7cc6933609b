"""The operations of both towers, as printed in their papers. x is (..., features); `p` holds the operation's
parameters."""

import math

import numpy as np

from .params import Array, Params


def linear(x: Array, p: Params) -> Array:  # (..., in) -> (..., out)
    y = p.product(x, p["weight"].T)
    return p.emit(y + p["bias"] if "bias" in p else y)


def layer_norm(x: Array, p: Params, eps: float) -> Array:
    """Ba et al. 2016, arXiv:1607.06450."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return p.emit((x - mean) / np.sqrt(variance + eps) * p["weight"] + p["bias"])


def rms_norm(x: Array, p: Params, eps: float) -> Array:
    """Zhang & Sennrich 2019, arXiv:1910.07467, with Gemma's (1 + weight)."""
    return p.emit(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * (1 + p["weight"]))


def gelu_tanh(x: Array) -> Array:
    """Hendrycks & Gimpel 2016, arXiv:1606.08415, the tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rope(x: Array, positions: Array, theta: float) -> Array:  # (B, T, H, D), (B, T) -> (B, T, H, D)
    """Su et al. 2021, arXiv:2104.09864: features i and i + D/2 are rotated by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    angle = positions[:, :, None, None] * frequency  # (B, T, 1, D/2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def softcap(x: Array, cap: float) -> Array:
    """Limits x smoothly to -cap .. cap: Gemma 2, arXiv:2408.00118."""
    return cap * np.tanh(x / cap)


def attention(
    q: Array, k: Array, v: Array, p: Params, mask: Array | None = None,
    scale: float | None = None, cap: float | None = None,
) -> Array:  # fmt: skip
    """softmax(q k^T scale) v, Vaswani et al. 2017, arXiv:1706.03762; query head h reads key/value head h //
    (H/K).

    (B, T, H, D), (B, S, K, D) twice -> (B, T, H * D); mask (B, T, S) is true where a query attends to a key.
    The default scale is 1 / sqrt(D). With a cap, `softcap` limits the scores before they are masked."""
    B, T, H, D = q.shape
    G = H // k.shape[2]
    out = np.empty_like(q)
    for b in range(B):
        for h in range(H):  # one at a time: at 896 pixels the scores of one head are 134 MB
            scores = p.product(q[b, :, h], k[b, :, h // G].T)  # (T, S)
            scores = scores * (1 / math.sqrt(D) if scale is None else scale)
            if cap is not None:
                scores = softcap(scores, cap)
            if mask is not None:
                scores = np.where(mask[b], scores, np.finfo(scores.dtype).min)
            out[b, :, h] = p.product(softmax(scores), v[b, :, h // G])
    return out.reshape(B, T, H * D)
