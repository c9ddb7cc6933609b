"""One function an operation: what the model files are written in. x is (..., features); arithmetic is float32 inside,
rounded once to x's dtype, which is that of the weights, at the end.

Each is a torch expression or a kernel of kernels/: the Triton kernel for CUDA tensors, unless `use` says otherwise. This is the one place that
chooses; how a CPU computes a matrix product is chosen in cpu_linear.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_linear, sampling

if TYPE_CHECKING:
    from .layers import AddRMSNorm, Linear, RMSNorm

_backend: ContextVar[str] = ContextVar("backend", default="auto")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Compute with "torch" or "triton" inside this block, or with "auto": Triton for CUDA tensors, torch for others. "numba" is torch, but
    for one row times a large matrix on a CPU."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def _triton(x: Tensor) -> bool:
    return x.is_cuda if _backend.get() == "auto" else _backend.get() == "triton"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:  # (..., in), (out, in) -> (..., out)
    """x @ weight^T + bias, or gelu_tanh of it: on a GPU within the product, whose sums are not rounded before the GELU. float32 keeps the two
    apart, because the tanh of cuBLAS's epilogue may be the hardware's, which is good to 11 bits."""
    rows = x.reshape(-1, x.shape[-1])
    if _triton(x):
        from .kernels.linear import linear as kernel
        from .kernels.linear import measured

        form = measured(rows, weight)
        if form is not None:
            return kernel(rows.contiguous(), weight, bias, form, gelu).view(*x.shape[:-1], -1)
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)  # torch has no gradient of the product with its GELU
    if gelu and x.is_cuda and x.dtype != torch.float32 and bias is not None and not trained:
        made = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)  # the tanh form on CUDA, the other one on a CPU
        return made.view(*x.shape[:-1], -1)
    cpu = x.device.type == "cpu"
    y = cpu_linear.linear(x, weight, bias=bias, numba=_backend.get() == "numba") if cpu else F.linear(x, weight, bias)
    return gelu_tanh(y) if gelu else y


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # (..., in), (out, in) of 8 bits, (out,) -> (..., out)
    """x @ weight^T * scale."""
    if x.device.type == "cpu":
        return cpu_linear.linear(x, weight, scale, numba=_backend.get() == "numba")
    return _quantized_rounded(x.reshape(-1, x.shape[-1]), weight, scale).view(*x.shape[:-1], -1)


def _quantized_rounded(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # (R, in), (out, in), (out,) -> (R, out)
    """With the weight in the dtype of x, some of its rows at a time. Scaled first: sums of whole numbers are beyond float16."""
    step = max(1, (1 << 26) // weight.shape[1])
    parts = zip(weight.split(step), scale.split(step), strict=True)
    return torch.cat([F.linear(rows, w.float().mul_(s.float()[:, None]).to(rows.dtype)) for w, s in parts], dim=1)


def embed(input_ids: Tensor, weight: Tensor) -> Tensor:  # (B, T), (V, E) -> (B, T, E)
    """Rows of the table times sqrt(E)."""
    rows = F.embedding(input_ids, weight)
    return (rows.float() * math.sqrt(weight.shape[1])).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if _triton(x):
        from .kernels.layer_norm import layer_norm as kernel

        return kernel(x.contiguous(), weight, bias, eps)
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """layer_norm of x + residual, and that sum."""
    if _triton(x):
        from .kernels.layer_norm import add_layer_norm as kernel

        return kernel(x.contiguous(), residual.contiguous(), weight, bias, eps)
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's: x / sqrt(mean(x^2) + eps) * (1 + weight)."""
    if _triton(x):
        from .kernels.rms_norm import rms_norm as kernel

        return kernel(x.contiguous(), weight, eps)
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (h * (1 + weight.float())).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual, and that sum."""
    if _triton(x):
        from .kernels.rms_norm import add_rms_norm as kernel

        return kernel(x.contiguous(), residual.contiguous(), weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def gelu_tanh(x: Tensor) -> Tensor:
    if x.is_cuda:  # computes in float32 inside
        return F.gelu(x, approximate="tanh")
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up."""
    if _triton(gate):
        from .kernels.geglu import geglu as kernel

        return kernel(gate, up)
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
    if _triton(q):
        from .kernels.rope import rope as kernel

        return kernel(q, k, v, rotation, positions, k_cache, v_cache)
    cos, sin = rotation[:, :, :, None]  # (B, T, 1, D/2) each
    turned = _rotate(torch.cat([q, k], dim=2), cos, sin)
    row = torch.arange(len(q), device=q.device)[:, None]
    k_cache[row, positions] = turned[:, :, q.shape[2] :]
    v_cache[row, positions] = v
    return turned[:, :, : q.shape[2]]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Seen(NamedTuple):
    """Which cached positions each query sees: those from `start` on (None: from 0) and before `limit`, (B, T) each."""

    start: Tensor | None
    limit: Tensor
    whole: bool  # whether every query sees every position that there is

    def mask(self, first: int, last: int, S: int) -> Tensor:  # (B, last - first, S), true where one of these queries looks
        position = torch.arange(S, device=self.limit.device)
        seen = position < self.limit[:, first:last, None]
        return seen if self.start is None else seen & (position >= self.start[:, first:last, None])


def visible(positions: Tensor, prefix: Tensor, S: int, window: int | None = None) -> Seen:  # (B, T), (B,)
    """Of S cached positions a token of the prefix sees its row's whole prefix; another one itself and all before it, or no more than
    the last `window` of these."""
    limit, start = torch.maximum(prefix[:, None], positions + 1), None
    if window is not None:
        start = (positions + 1 - window).clamp(min=0).masked_fill(positions < prefix[:, None], 0)
    return seen(start, limit, S, window)


def seen(start: Tensor | None, limit: Tensor, S: int, window: int | None = None) -> Seen:
    """Of S cached positions those from start, which says nothing without a window below S, to limit, (B, T) each."""
    start = None if window is None or window >= S else start
    return Seen(start, limit, not _triton(limit) and start is None and bool((limit >= S).all()))


SCORES = 1 << 24  # float32 scores that are made at a time: 64 MB


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen | None = None, scale: float | None = None, softcap: float | None = None, tickets: Tensor | None = None
) -> Tensor:
    """softmax(q k^T scale) v; query head h reads key/value head h // (H/K). No `seen`: all of it; no scale: 1 / sqrt(D); a softcap bends
    the scores.

    q (B, T, H, D); k, v (B, S, K, D) -> (B, T, H * D). The query heads of a key head stand as rows beside the tokens, so that
    keys are read once for all of them: on a CPU, for one token of PaliGemma 3B, ten times as fast as a copy for each head. tickets
    (B * K,): int32 zeros, kept by the caller for the kernel."""
    if _triton(q):
        from .kernels.decode_attention import decode_attention
        from .kernels.prefill_attention import prefill_attention

        if seen is None:
            return prefill_attention(q, k, v, None, scale=scale, softcap=softcap)
        if q.shape[1] > 1:
            return prefill_attention(q, k, v, seen.limit, start=seen.start, scale=scale, softcap=softcap)
        return decode_attention(q.contiguous(), k, v, seen.limit, start=seen.start, scale=scale, softcap=softcap, tickets=tickets)
    (_, T, H, D), K = q.shape, k.shape[2]
    rows = q.unflatten(2, (K, H // K)).transpose(1, 2).flatten(2, 3)  # (B, K, T * G, D)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if scale is None:
        scale = 1 / math.sqrt(D)
    if softcap is None and (seen is None or seen.whole):
        out = F.scaled_dot_product_attention(rows, keys, values, scale=scale)
    else:
        out = _attention_in_parts(rows, keys, values, seen, scale, softcap, H // K)
    return out.unflatten(2, (T, H // K)).transpose(1, 2).flatten(2)


def _attention_in_parts(rows: Tensor, keys: Tensor, values: Tensor, seen: Seen | None, scale: float, softcap: float | None, G: int) -> Tensor:
    """With a mask or a softcap, for a few tokens at a time: neither mask nor scores are ever whole. G rows are one token."""
    (B, K, R, _), S, dtype = rows.shape, keys.shape[2], rows.dtype
    step, out = max(1, SCORES // (B * K * G * S)), torch.empty_like(rows)
    if softcap is not None:
        keys, values = keys.float(), values.float()
    for t in range(0, R // G, step):
        place = slice(t * G, min((t + step) * G, R))
        part, mask = rows[:, :, place], None
        if seen is not None and not seen.whole:
            mask = seen.mask(t, t + step, S).repeat_interleave(G, dim=1)[:, None]  # (B, 1, tokens * G, S)
        if softcap is None:
            out[:, :, place] = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scale)
            continue
        scores = softcap_((part.float() * scale) @ keys.transpose(2, 3), softcap)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        out[:, :, place] = (scores.softmax(dim=-1) @ values).to(dtype)
    return out


def softcap_(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place."""
    return x.div_(cap).tanh_().mul_(cap)


class Sum(NamedTuple):
    """The residual stream as x + branch, or x + norm(branch), yet to be made: by the operation that comes next, whose own norm needs the
    whole row anyway."""

    x: Tensor
    branch: Tensor
    norm: "RMSNorm | None"
    squares: Tensor | None = None  # (R, parts) float32, parts of the sums of squares of the branch's rows, where a kernel has left them


def add(x: Tensor, branch: Tensor) -> Tensor | Sum:
    """x + branch; on a GPU the norm that comes next makes it."""
    return Sum(x, branch, None) if _triton(x) and not unfused() else x + branch


def whole(x: Tensor | Sum) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return x.x + (x.branch if x.norm is None else x.norm(x.branch))


def norm_qkv_rope(
    x: Tensor | Sum, norm: "AddRMSNorm", projections: tuple["Linear", "Linear", "Linear"], rotation: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> tuple[Tensor, Tensor]:  # (B, T, E) -> (B, T, H, D), (B, T, E)
    """The queries of norm(x), turned by rotation (2, B, T, D/2), and x; keys and values go to positions (B, T) of the caches (B, S, K, D)."""
    if _few(x):
        from .kernels.norm_qkv_rope import norm_qkv_rope as kernel

        q, total = kernel(_rows(x, norm), *_packed(projections), rotation, positions, k_cache, v_cache)
        return q, total.view(*positions.shape, -1)
    normed, total = norm(x)
    q, k, v = (y.unflatten(-1, (-1, k_cache.shape[-1])) for y in linears(normed, projections))
    return rope(q, k, v, rotation, positions, k_cache, v_cache), total


def project_add(x: Tensor, linear: "Linear", residual: Tensor, norm: "RMSNorm | None") -> Tensor | Sum:  # (..., in), (..., E) -> (..., E)
    """residual + linear(x), or residual + norm(linear(x))."""
    if _few(x):
        from .kernels.project_add import project_add as kernel

        out, squares = kernel(x, linear.weight, linear.weight_scale, residual if norm is None else None)
        return out if norm is None else Sum(residual, out, norm, squares)
    return add(residual, linear(x) if norm is None else norm(linear(x)))


def project_gelu(x: Tensor, module: "Linear") -> Tensor:  # (..., in) -> (..., out)
    """gelu_tanh(module(x)), in one product."""
    return gelu_tanh(module(x)) if unfused() else linear(x, module.weight, module.bias, gelu=True)


def norm_geglu(x: Tensor | Sum, norm: "AddRMSNorm", gate: "Linear", up: "Linear") -> tuple[Tensor, Tensor]:  # (..., E) -> (..., M), (..., E)
    """geglu of the gate's and up's outputs for norm(x), and x."""
    if _few(x):
        from .kernels.norm_geglu import norm_geglu as kernel

        out, total = kernel(_rows(x, norm), *_packed((gate, up)))
        shape = (x if isinstance(x, Tensor) else x.x).shape
        return out.view(*shape[:-1], -1), total.view(shape)
    normed, total = norm(x)
    return geglu(*linears(normed, (gate, up))), total


def norm_head(
    x: Tensor | Sum, norm: "AddRMSNorm", weight: Tensor, scale: Tensor | None, softcap: float | None, best: Tensor | None = None
) -> Tensor:  # (..., E) -> (..., V) float32
    """Logits of norm(x); a weight with a scale is of 8 bits. best: where the kernel is to begin the argmax that `next_token` ends."""
    if _few(x):
        from .kernels.norm_head import norm_head as kernel

        return kernel(_rows(x, norm), weight, scale, softcap, best).view(*(x if isinstance(x, Tensor) else x.x).shape[:-1], -1)
    normed, _ = norm(x)
    logits = (linear(normed, weight) if scale is None else quantized_linear(normed, weight, scale)).float()
    return logits if softcap is None else softcap_(logits, softcap)


class Next(NamedTuple):
    """What a row goes on with, in memory that stays where it is."""

    said: Tensor  # (N, B) int64 its tokens
    number: Tensor  # (B,) int64 how many of them there are
    x: Tensor  # (B, 1, E) the last one's embedding
    position: Tensor  # (B, 1) int64 where it goes in the row's cache
    rotation: Tensor  # (2, B, 1, D/2) float32, cos and sin there
    limit: Tensor  # (B, 1) int64 the positions that it sees: before this
    start: Tensor | None  # (B, 1) int64 and, where layers have a window, from here on
    best: Tensor  # (B, 64) int64 where the kernels begin an argmax: in 64 places, for one would be written by thousands of programs at once


def next_token(logits: Tensor, tokens: Tensor | None, following: Next, table: Tensor, rotation: Tensor, window: int | None) -> None:
    """Append the tokens (B,), or those of the largest logits (B, V) where none are given, and make everything in `following` ready for the
    pass that they begin. table (V, E) of embeddings; rotation (2, S, D/2) of angles. Logits with a NaN or infinity have the token -1."""
    said, count, x, position, rotated, limit, start, _ = following
    if tokens is None and not _few(logits):
        tokens = torch.where(logits.isfinite().all(dim=-1), logits.argmax(dim=-1), -1)
    if _triton(logits):
        from .kernels.next_token import next_token as kernel

        kernel(tokens, following.best, said, count, position, limit, start, window or 0, x, rotated, table, rotation)
        return
    assert tokens is not None
    said[count, torch.arange(len(tokens), device=tokens.device)] = tokens
    count += 1
    position += 1
    torch.add(position, 1, out=limit)
    if start is not None and window is not None:
        torch.sub(limit, window, out=start).clamp_(min=0)
    x.copy_(embed(tokens.clamp(min=0)[:, None], table))
    rotated.copy_(rotation[:, position])


class Chances(NamedTuple):
    """By what a row's tokens are sampled, in memory that stays where it is."""

    temperature: Tensor  # () float64
    top_p: Tensor  # () float64
    uniform: Tensor  # (B, N) float64 in [0, 1), one for each token
    state: Tensor  # (B, STATE) int64 where the kernels add up probabilities: zeros before and after


STATE = 4096 + 8  # intervals of the logits, and what the kernels count


def sample(logits: Tensor, following: Next, chances: Chances) -> Tensor:  # (B, V) float32 -> (B,)
    """A token of each row's nucleus, as paligemma/sampling.py says; -1 where a logit is NaN or infinite. following.best holds the beginning of
    an argmax where there are few rows, and is as `next_token` leaves it then."""
    temperature, top_p, uniform, state = chances
    if _triton(logits):
        from .kernels.top_p_histogram import top_p_histogram
        from .kernels.top_p_search import top_p_search

        if not _few(logits):
            following.best[:, 0] = _largest(logits)
        tokens, room = (torch.empty(shape, dtype=torch.int64, device=logits.device) for shape in (len(logits), logits.shape))
        top_p_histogram(logits, following.best, temperature, state)
        for said in (None, tokens):
            top_p_search(logits, following.best, temperature, top_p, uniform, following.number, state, room, said)
        return tokens
    row = torch.arange(len(logits), device=logits.device)
    numbers = temperature.item(), top_p.item(), uniform[row, following.number].tolist()
    return torch.tensor([sampling.sample(x, *numbers[:2], u) for x, u in zip(logits, numbers[2], strict=True)], device=logits.device)


def _largest(logits: Tensor) -> Tensor:  # (B, V) float32 -> (B,) int64
    """The largest, as norm_head's kernel writes it, without its index."""
    bits = logits.amax(dim=-1).view(torch.int32)
    bits = torch.where(logits.isfinite().all(dim=-1), bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7F800000)
    return bits.long() << 32


_one_by_one: ContextVar[bool] = ContextVar("one_by_one", default=False)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Inside this block every module computes its own output, nothing is fused, for those who want to see it."""
    token = _one_by_one.set(True)
    try:
        yield
    finally:
        _one_by_one.reset(token)


def unfused() -> bool:
    return _one_by_one.get()


def _few(x: Tensor | Sum) -> bool:
    """Whether the fused kernels are for it, which read a weight once for up to 16 rows."""
    x = x if isinstance(x, Tensor) else x.x
    return _triton(x) and not unfused() and x.numel() <= 16 * x.shape[-1]


def _rows(x: Tensor | Sum, norm: "AddRMSNorm"):
    from .kernels.gemv import Rows

    if isinstance(x, Tensor):
        return Rows(x.flatten(0, -2).contiguous(), None, None, norm.weight, norm.eps)
    assert x.norm is not None
    assert x.norm.eps == norm.eps
    return Rows(x.x.flatten(0, -2), x.branch.flatten(0, -2), x.norm.weight, norm.weight, norm.eps, x.squares)


def linears(x: Tensor, modules: tuple["Linear", ...]) -> tuple[Tensor, ...]:  # (..., in) -> (..., out) each
    """What each module makes of x; in one product where their weights are packed."""
    if packed(*(module.weight for module in modules)) is None or unfused():
        return tuple(module(x) for module in modules)
    weights, scale = _packed(modules)
    biases = [module.bias for module in modules if module.bias is not None]
    y = linear(x, weights, packed(*biases) if biases else None) if scale is None else quantized_linear(x, weights, scale)
    return y.split([len(module.weight) for module in modules], dim=-1)


def _packed(linears: tuple["Linear", ...]) -> tuple[Tensor, Tensor | None]:
    weights, scales = packed(*(linear.weight for linear in linears)), [linear.weight_scale for linear in linears if linear.weight_scale is not None]
    if weights is None:  # of a copied model
        from .layers import pack

        pack(linears)
        return _packed(linears)
    scale = packed(*scales) if scales else None
    assert (scale is None) == (not scales), "scales that lie apart"
    return weights, scale


def packed(*parts: Tensor) -> Tensor | None:
    """One tensor of those that lie one behind another in one allocation; None of others."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != end or not part.is_contiguous():
            return None
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
