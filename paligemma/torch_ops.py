"""The operations of ops.py as torch expressions, for CPUs and for GPUs without the kernels. Shapes are those
of ops.py."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int4, sampling
from .attention_range import AttentionRange
from .buffers import DecodeBuffers, SamplingBuffers

SCORES = 1 << 24  # float32 attention scores that are computed at a time: 64 MB
BLOCK = 1 << 18  # values of an elementwise operation whose intermediates, 1 MB each, stay in the cache


def has_gelu_epilogue(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_gelu` computes this product, and accurately. It does not in float32, where the tanh may
    be the hardware's, which has 11 correct bits; and not if a gradient is wanted, which torch does not
    provide for it."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.is_cuda and x.dtype != torch.float32 and not trained


def linear_gelu(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(rows @ weight^T + bias) in one operation, which does not round the sums before the GELU: (R,
    in), (out, in), (out,) -> (R, out). For CUDA only: on a CPU, this operation of torch computes the exact
    GELU."""
    return torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)


def quantized_linear(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ weight^T for x (R, in), as ops.quantized_linear describes. Converts some rows of the weight at a
    time to the dtype of `rows`. The weight is scaled before the product, because sums of unscaled values
    overflow float16."""
    step, dtype = max(1, (1 << 26) // rows.shape[1]), rows.dtype
    parts = zip(weight.split(step), scale.split(step), strict=True)
    if weight.dtype == int4.STORED:
        x = int4.reordered(rows)
        memory = torch.empty(min(step, len(weight)), x.shape[1], dtype=torch.float32, device=x.device)
        return torch.cat(
            [F.linear(x, int4.widened(w, s, memory[: len(w)]).to(dtype)) for w, s in parts], dim=1
        )
    return torch.cat([F.linear(rows, w.float().mul_(s.float()[:, None]).to(dtype)) for w, s in parts], dim=1)


def embed(input_ids: Tensor, weight: Tensor) -> Tensor:
    rows = F.embedding(input_ids, weight)
    return (rows.float() * math.sqrt(weight.shape[1])).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (h * (1 + weight.float())).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    if x.is_cuda:  # its arithmetic is float32
        return F.gelu(x, approximate="tanh")
    return in_blocks(lambda x: F.gelu(x.float(), approximate="tanh"), x)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return in_blocks(lambda gate, up: F.gelu(gate.float(), approximate="tanh") * up.float(), gate, up)


def in_blocks(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """compute(*inputs), an elementwise function of inputs of one shape (..., K), in their dtype. On a CPU
    a large one is computed some rows at a time, so that its float32 intermediates stay in the cache: on two
    Zen 4 cores the GeGLU of 1040 x 16384 takes 50 ms instead of 150."""
    first = inputs[0]
    if not first.is_cpu or torch.is_grad_enabled() or first.numel() <= 16 * BLOCK:
        return compute(*inputs).to(first.dtype)
    out = torch.empty(first.shape, dtype=first.dtype, device="cpu")
    parts = zip(*(x.flatten(0, -2).split(max(1, BLOCK // x.shape[-1])) for x in (out, *inputs)), strict=True)
    for part, *given in parts:
        part.copy_(compute(*given))
    return out


@lru_cache(maxsize=8)
def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The cosines and sines of position * theta^(-2i/D), (2, length, D/2) float32. They are computed in
    float64, because the angle grows with the position."""
    frequency = theta ** (-torch.arange(head_dim // 2, dtype=torch.float64, device=device) * 2 / head_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).float()


def rope(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    cos, sin = rotation[:, :, :, None]  # (B, T, 1, D/2) each
    rotated = _rotate(torch.cat([q, k], dim=2), cos, sin)
    row = torch.arange(len(q), device=q.device)[:, None]
    k_cache[row, positions] = rotated[:, :, q.shape[2] :]
    v_cache[row, positions] = v
    return rotated[:, :, : q.shape[2]]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: AttentionRange | None,
    scale: float | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """The query heads that share a key head become rows of one product, so that keys and values are read once
    for all of them. For one token of PaliGemma 3B on a CPU, this is ten times as fast as to repeat the keys
    for each head."""
    (_, T, H, D), K = q.shape, k.shape[2]
    rows = q.unflatten(2, (K, H // K)).transpose(1, 2).flatten(2, 3)  # (B, K, T * G, D)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if scale is None:
        scale = 1 / math.sqrt(D)
    if softcap is None and (visible is None or visible.everything):
        out = F.scaled_dot_product_attention(rows, keys, values, scale=scale)
    else:
        out = _attention_in_parts(rows, keys, values, visible, scale, softcap, H // K)
    return out.unflatten(2, (T, H // K)).transpose(1, 2).flatten(2)


def _attention_in_parts(
    rows: Tensor, keys: Tensor, values: Tensor, visible: AttentionRange | None, scale: float,
    softcap: float | None, G: int,
) -> Tensor:  # fmt: skip
    """Attention with a mask or a softcap: (B, K, T * G, D), (B, K, S, D) twice -> (B, K, T * G, D). Each
    token has G rows. A few tokens are computed at a time, so that the masks and scores of all tokens never
    exist at once."""
    (B, K, R, _), S, dtype = rows.shape, keys.shape[2], rows.dtype
    step, out = max(1, SCORES // (B * K * G * S)), torch.empty_like(rows)
    if softcap is not None:
        keys, values = keys.float(), values.float()
    for t in range(0, R // G, step):
        part = slice(t * G, min((t + step) * G, R))
        queries, mask = rows[:, :, part], None
        if visible is not None and not visible.everything:
            mask = visible.mask(t, t + step, S).repeat_interleave(G, dim=1)[:, None]  # (B, 1, tokens * G, S)
        if softcap is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
            out[:, :, part] = attended
            continue
        scores = softcap_((queries.float() * scale) @ keys.transpose(2, 3), softcap)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        out[:, :, part] = (scores.softmax(dim=-1) @ values).to(dtype)
    return out


def softcap_(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place."""
    return x.div_(cap).tanh_().mul_(cap)


def next_token(
    tokens: Tensor, buffers: DecodeBuffers, table: Tensor, rotation: Tensor, window: int | None
) -> None:
    buffers.output_ids[buffers.output_length, torch.arange(len(tokens), device=tokens.device)] = tokens
    buffers.output_length.add_(1)
    buffers.position.add_(1)
    torch.add(buffers.position, 1, out=buffers.limit)
    if buffers.start is not None and window is not None:
        torch.sub(buffers.limit, window, out=buffers.start).clamp_(min=0)
    buffers.x.copy_(embed(tokens.clamp(min=0)[:, None], table))
    buffers.rotation.copy_(rotation[:, buffers.position])


def sample(logits: Tensor, buffers: DecodeBuffers, sampling_buffers: SamplingBuffers) -> Tensor:
    row = torch.arange(len(logits), device=logits.device)
    uniform = sampling_buffers.uniform[row, buffers.output_length]
    numbers = (x.tolist() for x in (sampling_buffers.temperature, sampling_buffers.top_p, uniform))
    tokens = [sampling.sample(*x) for x in zip(logits, *numbers, strict=True)]
    return torch.tensor(tokens, device=logits.device)


def finite(logits: Tensor) -> Tensor:  # (..., V) -> (...)
    """Whether all logits of a row are finite: the extremes of a row with NaN are NaN. On a CPU this takes a
    tenth of the time of torch.isfinite."""
    return logits.amin(dim=-1).isfinite() & logits.amax(dim=-1).isfinite()


def largest_as_key(logits: Tensor) -> Tensor:  # (B, V) float32 -> (B,) int64
    """A key for each row, as the kernel of the output head stores it: the upper half holds the largest logit.
    The lower half, which would hold its index, is zero."""
    bits = logits.amax(dim=-1).view(torch.int32)
    bits = torch.where(finite(logits), bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7F800000)
    return bits.long() << 32
