"""One function for each operation. The model files are written in terms of these functions.

Each function chooses how its operation is computed: by the Triton kernel of kernels/ if the tensors are on a
GPU, otherwise by the torch expression of torch_ops.py, unless `use` says something else. For matrix products
on a CPU, cpu_linear.py has a table of its own, and it chooses the attention there.

x is (..., features). Arithmetic inside an operation is float32. The result is rounded once, at the end, to
the dtype of x, which is also that of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_linear, torch_ops
from .attention_range import AttentionRange
from .buffers import DecodeBuffers, SamplingBuffers

MOST_ROWS = 16  # the most rows for which the fused decode kernels read a weight once

_backend: ContextVar[str] = ContextVar("backend", default="auto")
_fusion: ContextVar[bool] = ContextVar("fusion", default=True)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Inside this block, compute with "torch" or "triton"; with "auto", which is Triton for CUDA tensors and
    torch for others; or with "numba", which is torch except for large products, attention and decode steps in
    bfloat16 on a CPU."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def without_fusion() -> Iterator[None]:
    """Inside this block, each module that has a forward computes its own output, so that its hooks are
    called."""
    token = _fusion.set(False)
    try:
        yield
    finally:
        _fusion.reset(token)


def fusion() -> bool:
    return _fusion.get()


def triton(x: Tensor) -> bool:
    """Whether operations on x are computed by the Triton kernels."""
    return x.is_cuda if _backend.get() == "auto" else _backend.get() == "triton"


def fused_decode(x: Tensor) -> bool:
    """Whether the fused kernels of a decode step compute on x: they do for up to 16 rows."""
    return triton(x) and fusion() and x.numel() <= MOST_ROWS * x.shape[-1]


def numba(x: Tensor) -> bool:
    """Whether the Numba kernels may compute on x, several operations at once."""
    return _backend.get() == "numba" and x.device.type == "cpu" and fusion()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x @ weight^T + bias, or gelu_tanh of it: (..., in), (out, in), (out,) -> (..., out)."""
    rows = x.reshape(-1, x.shape[-1])
    if triton(x):
        from .kernels.linear import linear as kernel
        from .kernels.linear import measured

        form = measured(rows, weight)
        if form is not None:
            return kernel(rows.contiguous(), weight, bias, form, gelu).view(*x.shape[:-1], -1)
    if gelu and bias is not None and torch_ops.has_gelu_epilogue(x, weight):
        return torch_ops.linear_gelu(rows, weight, bias).view(*x.shape[:-1], -1)
    if x.device.type == "cpu":
        return cpu_linear.linear(x, weight, bias=bias, gelu=gelu, numba=_backend.get() == "numba")
    y = F.linear(x, weight, bias)
    return gelu_tanh(y) if gelu else y


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ weight^T for a weight that is 8-bit (out, in) with scale (out,), or 4-bit (out, in // 8) with scale
    (out, in // 32): (..., in) -> (..., out)."""
    if x.device.type == "cpu":
        return cpu_linear.linear(x, weight, scale, numba=_backend.get() == "numba")
    return torch_ops.quantized_linear(x.reshape(-1, x.shape[-1]), weight, scale).view(*x.shape[:-1], -1)


def embed(input_ids: Tensor, weight: Tensor) -> Tensor:  # (B, T), (V, E) -> (B, T, E)
    """Rows of the table times sqrt(E)."""
    return torch_ops.embed(input_ids, weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if triton(x):
        from .kernels.layer_norm import layer_norm as kernel

        return kernel(x.contiguous(), weight, bias, eps)
    return torch_ops.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual), and x + residual."""
    if triton(x):
        from .kernels.layer_norm import add_layer_norm as kernel

        return kernel(x.contiguous(), residual.contiguous(), weight, bias, eps)
    total = x + residual
    return torch_ops.layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's norm: x / sqrt(mean(x^2) + eps) * (1 + weight)."""
    if triton(x):
        from .kernels.rms_norm import rms_norm as kernel

        return kernel(x.contiguous(), weight, eps)
    return torch_ops.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual), and x + residual."""
    if triton(x):
        from .kernels.rms_norm import add_rms_norm as kernel

        return kernel(x.contiguous(), residual.contiguous(), weight, eps)
    total = x + residual
    return torch_ops.rms_norm(total, weight, eps), total


def gelu_tanh(x: Tensor) -> Tensor:
    return torch_ops.gelu_tanh(x)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up."""
    if triton(gate):
        from .kernels.geglu import geglu as kernel

        return kernel(gate, up)
    return torch_ops.geglu(gate, up)


def linear_geglu(x: Tensor, gate: cpu_linear.Weight, up: cpu_linear.Weight) -> Tensor:
    """gelu_tanh(gate product) * up product on a CPU: (..., in) -> (..., out). gate, up: a weight and its
    scale, or None, as `linear` and `quantized_linear` take them."""
    return cpu_linear.linear_geglu(x, gate, up, numba=_backend.get() == "numba")


def rope(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotate q (B, T, H, D) and k (B, T, K, D) by rotation (2, B, T, D/2), which holds cosines and sines;
    write k and v at positions (B, T) of the caches (B, S, K, D); return the rotated q."""
    if triton(q):
        from .kernels.rope import rope as kernel

        return kernel(q, k, v, rotation, positions, k_cache, v_cache)
    return torch_ops.rope(q, k, v, rotation, positions, k_cache, v_cache)


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: AttentionRange | None = None,
    scale: float | None = None, softcap: float | None = None, counters: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v: (B, T, H, D), (B, S, K, D) twice -> (B, T, H * D).

    Query head h reads the key and value head h // (H/K). visible: the keys that each query attends to; None
    means all keys. scale: None means 1 / sqrt(D). softcap: scores become softcap * tanh(scores / softcap).
    counters (B * K,): int32 zeros, in which the decode kernel counts, and which it resets to zero."""
    if _backend.get() == "numba" and cpu_linear.attends(q, k, v, visible, scale):
        from .kernels.cpu_attention import cpu_attention

        return cpu_attention(q, k, v, scale, softcap)
    if not triton(q):
        return torch_ops.attention(q, k, v, visible, scale, softcap)
    from .kernels.decode_attention import decode_attention
    from .kernels.prefill_attention import prefill_attention

    if visible is None:
        return prefill_attention(q, k, v, None, scale=scale, softcap=softcap)
    start, limit = visible.start, visible.limit
    if q.shape[1] > 1:
        return prefill_attention(q, k, v, limit, start=start, scale=scale, softcap=softcap)
    q = q.contiguous()
    return decode_attention(q, k, v, limit, start=start, scale=scale, softcap=softcap, counters=counters)


def next_token(
    logits: Tensor, tokens: Tensor | None, buffers: DecodeBuffers,
    table: Tensor, rotation: Tensor, window: int | None,
) -> None:  # fmt: skip
    """Append one token to each row's output, and write the input of the next decode step to `buffers`.

    logits (B, V) float32; tokens (B,) int64, or None for the argmax of the logits; table (V, E), the
    embeddings; rotation (2, S, D/2), the cosines and sines of every position. A row whose logits hold NaN or
    infinity gets the token -1."""
    if tokens is None and not fused_decode(logits):
        tokens = torch.where(torch_ops.finite(logits), logits.argmax(dim=-1), -1)
    if triton(logits):
        from .kernels.next_token import next_token as kernel

        kernel(
            tokens, buffers.argmax_scratch, buffers.output_ids, buffers.output_length,
            buffers.position, buffers.limit, buffers.start, window or 0,
            buffers.x, buffers.rotation, table, rotation,
        )  # fmt: skip
        return
    assert tokens is not None
    torch_ops.next_token(tokens, buffers, table, rotation, window)


def sample(logits: Tensor, buffers: DecodeBuffers, sampling: SamplingBuffers) -> Tensor:
    """A token from each row's nucleus, as defined in sampling.py, or -1 if the row's logits hold NaN or
    infinity: (B, V) float32 -> (B,).

    For up to 16 rows, the kernel of the output head has left the argmax in `buffers`. This kernel and
    `next_token` reset it."""
    if not triton(logits):
        return torch_ops.sample(logits, buffers, sampling)
    from .kernels.top_p_histogram import top_p_histogram
    from .kernels.top_p_search import top_p_search

    temperature, top_p, uniform, scratch = sampling
    if not fused_decode(logits):
        buffers.argmax_scratch[:, 0] = torch_ops.largest_as_key(logits)
    argmax, length = buffers.argmax_scratch, buffers.output_length
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    room = torch.empty(logits.shape, dtype=torch.int64, device=logits.device)
    top_p_histogram(logits, argmax, temperature, scratch)
    for output in (None, tokens):
        top_p_search(logits, argmax, temperature, top_p, uniform, length, scratch, room, output)
    return tokens
