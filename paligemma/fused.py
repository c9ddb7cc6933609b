"""Operations that join several modules, which a GPU fuses: a norm and the products that follow it, a product
and the residual sum that follows it.

For up to 16 rows, one Triton kernel computes such an operation. Otherwise the modules compute one after
another, but for a GELU or GeGLU after a product. Where Triton kernels compute the modules, the residual sum
is still deferred to the next norm, because that norm reads whole rows anyway. On a CPU, cpu_step.py computes
whole decode steps."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import ops, torch_ops
from .layers import LayerNorm, Linear, RMSNorm
from .packing import is_packed, packed, packed_weights


class DeferredResidual(NamedTuple):
    """The sum x + branch, or x + norm(branch), which the next operation computes."""

    x: Tensor
    branch: Tensor
    norm: RMSNorm | None = None
    squares: Tensor | None = None  # (R, parts) float32, parts of the sum of squares of each row of the branch


Residual = Tensor | DeferredResidual  # the residual stream between two operations


def add(x: Tensor, branch: Tensor) -> Residual:
    """x + branch."""
    return DeferredResidual(x, branch) if ops.triton(x) and ops.fusion() else x + branch


def resolve(x: Residual) -> Tensor:
    """The residual stream as a tensor."""
    if isinstance(x, Tensor):
        return x
    return x.x + (x.branch if x.norm is None else x.norm(x.branch))


def norm_residual(x: Residual, norm: LayerNorm | RMSNorm) -> tuple[Tensor, Tensor]:
    """norm(x), and x."""
    if isinstance(x, Tensor):
        return norm(x), x
    assert x.norm is None
    return norm.add(x.branch, x.x)


def norm_qkv_rope(
    x: Residual, norm: RMSNorm, projections: Sequence[Linear], rotation: Tensor, positions: Tensor,
    k_cache: Tensor, v_cache: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The queries of norm(x), rotated by rotation (2, B, T, D/2), and x: (B, T, E) -> (B, T, H, D), (B, T,
    E). Writes keys and values at positions (B, T) of the caches (B, S, K, D)."""
    if ops.fused_decode(_stored(x)):
        from .kernels.norm_qkv_rope import norm_qkv_rope as kernel

        q, total = kernel(_rows(x, norm), *packed_weights(projections), rotation, positions, k_cache, v_cache)
        return q, total.view(*positions.shape, -1)
    normed, total = norm_residual(x, norm)
    q, k, v = (y.unflatten(-1, (-1, k_cache.shape[-1])) for y in linears(normed, projections))
    return ops.rope(q, k, v, rotation, positions, k_cache, v_cache), total


def project_add(x: Tensor, linear: Linear, residual: Tensor, norm: RMSNorm | None) -> Residual:
    """residual + linear(x), or residual + norm(linear(x)): (..., in), (..., E) -> (..., E)."""
    if ops.fused_decode(x):
        from .kernels.project_add import project_add as kernel

        out, squares = kernel(x, linear.weight, linear.weight_scale, residual if norm is None else None)
        return out if norm is None else DeferredResidual(residual, out, norm, squares)
    return add(residual, linear(x) if norm is None else norm(linear(x)))


def norm_geglu(x: Residual, norm: RMSNorm, gate: Linear, up: Linear) -> tuple[Tensor, Tensor]:
    """gelu_tanh(gate(norm(x))) * up(norm(x)), and x: (..., E) -> (..., M), (..., E)."""
    if ops.fused_decode(_stored(x)):
        from .kernels.norm_geglu import norm_geglu as kernel

        shape = _stored(x).shape
        out, total = kernel(_rows(x, norm), *packed_weights((gate, up)))
        return out.view(*shape[:-1], -1), total.view(shape)
    normed, total = norm_residual(x, norm)
    if ops.numba(normed) and gate.bias is None and up.bias is None:
        return ops.linear_geglu(normed, gate.stored, up.stored), total
    return ops.geglu(*linears(normed, (gate, up))), total


def norm_head(
    x: Residual, norm: RMSNorm, weight: Tensor, scale: Tensor | None, softcap: float | None,
    argmax_scratch: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The logits of norm(x): (..., E) -> (..., V) float32. A weight with a scale is 8-bit. The kernel stores
    partial argmaxes, which ops.next_token reads, in argmax_scratch (B, 64)."""
    if ops.fused_decode(_stored(x)):
        from .kernels.norm_head import norm_head as kernel

        return kernel(_rows(x, norm), weight, scale, softcap, argmax_scratch).view(*_stored(x).shape[:-1], -1)
    normed, _ = norm_residual(x, norm)
    y = ops.linear(normed, weight) if scale is None else ops.quantized_linear(normed, weight, scale)
    logits = y.float()
    return logits if softcap is None else torch_ops.softcap_(logits, softcap)


def project_gelu(x: Tensor, linear: Linear) -> Tensor:  # (..., in) -> (..., out)
    """gelu_tanh(linear(x))."""
    return ops.linear(x, linear.weight, linear.bias, gelu=True) if ops.fusion() else ops.gelu_tanh(linear(x))


def linears(x: Tensor, modules: Sequence[Linear]) -> tuple[Tensor, ...]:  # (..., in) -> (..., out) each
    """The outputs of all modules, computed by one product if their weights are packed."""
    if not is_packed(modules) or not ops.fusion():
        return tuple(module(x) for module in modules)
    weights, scale = packed_weights(modules)
    biases = [module.bias for module in modules if module.bias is not None]
    bias = packed(*biases) if biases else None
    y = ops.linear(x, weights, bias) if scale is None else ops.quantized_linear(x, weights, scale)
    return y.split([len(module.weight) for module in modules], dim=-1)


def _stored(x: Residual) -> Tensor:
    """A tensor with the shape, dtype and device of the residual stream."""
    return x if isinstance(x, Tensor) else x.x


def _rows(x: Residual, norm: RMSNorm):
    """The input of a fused kernel that begins with norm(x)."""
    from .kernels.gemv_input import GemvInput

    if isinstance(x, Tensor):
        return GemvInput(x.flatten(0, -2).contiguous(), None, None, norm.weight, norm.eps)
    assert x.norm is not None
    assert x.norm.eps == norm.eps
    rows, branch = x.x.flatten(0, -2), x.branch.flatten(0, -2)
    return GemvInput(rows, branch, x.norm.weight, norm.weight, norm.eps, x.squares)
