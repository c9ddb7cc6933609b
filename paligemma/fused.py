"""Operations on modules that a GPU fuses: a norm with the products that follow it, a product with the
residual sum that follows it.

For up to 16 rows one Triton kernel computes each of them. Otherwise, and on a CPU, the modules compute one
after another; where kernels compute them, the residual sum still waits for the norm that comes next, because
that reads whole rows anyway."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import ops, torch_ops
from .layers import LayerNorm, Linear, RMSNorm
from .packing import is_packed, packed, packed_weights


class DeferredResidual(NamedTuple):
    """x + branch, or x + norm(branch), which the operation that comes next computes."""

    x: Tensor
    branch: Tensor
    norm: RMSNorm | None = None
    squares: Tensor | None = (
        None  # (R, parts) float32: partial sums of the squares of each of the branch's rows, if the kernel before left them
    )


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
    x: Residual,
    norm: RMSNorm,
    projections: Sequence[Linear],
    rotation: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> tuple[Tensor, Tensor]:  # (B, T, E) -> (B, T, H, D), (B, T, E)
    """The queries of norm(x), rotated by rotation (2, B, T, D/2), and x. Keys and values are written at
    positions (B, T) of the caches (B, S, K, D)."""
    if ops.fused_decode(_stored(x)):
        from .kernels.norm_qkv_rope import norm_qkv_rope as kernel

        q, total = kernel(_rows(x, norm), *packed_weights(projections), rotation, positions, k_cache, v_cache)
        return q, total.view(*positions.shape, -1)
    normed, total = norm_residual(x, norm)
    q, k, v = (y.unflatten(-1, (-1, k_cache.shape[-1])) for y in linears(normed, projections))
    return ops.rope(q, k, v, rotation, positions, k_cache, v_cache), total


def project_add(
    x: Tensor, linear: Linear, residual: Tensor, norm: RMSNorm | None
) -> Residual:  # (..., in), (..., E) -> (..., E)
    """residual + linear(x), or residual + norm(linear(x))."""
    if ops.fused_decode(x):
        from .kernels.project_add import project_add as kernel

        out, squares = kernel(x, linear.weight, linear.weight_scale, residual if norm is None else None)
        return out if norm is None else DeferredResidual(residual, out, norm, squares)
    return add(residual, linear(x) if norm is None else norm(linear(x)))


def norm_geglu(
    x: Residual, norm: RMSNorm, gate: Linear, up: Linear
) -> tuple[Tensor, Tensor]:  # (..., E) -> (..., M), (..., E)
    """gelu_tanh(gate(norm(x))) * up(norm(x)), and x."""
    if ops.fused_decode(_stored(x)):
        from .kernels.norm_geglu import norm_geglu as kernel

        shape = _stored(x).shape
        out, total = kernel(_rows(x, norm), *packed_weights((gate, up)))
        return out.view(*shape[:-1], -1), total.view(shape)
    normed, total = norm_residual(x, norm)
    return ops.geglu(*linears(normed, (gate, up))), total


def norm_head(
    x: Residual,
    norm: RMSNorm,
    weight: Tensor,
    scale: Tensor | None,
    softcap: float | None,
    argmax_scratch: Tensor | None = None,
) -> Tensor:  # (..., E) -> (..., V) float32
    """The logits of norm(x). A weight that has a scale is 8-bit. argmax_scratch (B, 64): where the kernel
    leaves partial argmaxes, which ops.next_token reads."""
    if ops.fused_decode(_stored(x)):
        from .kernels.norm_head import norm_head as kernel

        return kernel(_rows(x, norm), weight, scale, softcap, argmax_scratch).view(*_stored(x).shape[:-1], -1)
    normed, _ = norm_residual(x, norm)
    logits = (
        ops.linear(normed, weight) if scale is None else ops.quantized_linear(normed, weight, scale)
    ).float()
    return logits if softcap is None else torch_ops.softcap_(logits, softcap)


def project_gelu(x: Tensor, linear: Linear) -> Tensor:  # (..., in) -> (..., out)
    """gelu_tanh(linear(x))."""
    return ops.linear(x, linear.weight, linear.bias, gelu=True) if ops.fusion() else ops.gelu_tanh(linear(x))


def linears(x: Tensor, modules: Sequence[Linear]) -> tuple[Tensor, ...]:  # (..., in) -> (..., out) each
    """The output of each module, from one product where their weights are packed."""
    if not is_packed(modules) or not ops.fusion():
        return tuple(module(x) for module in modules)
    weights, scale = packed_weights(modules)
    biases = [module.bias for module in modules if module.bias is not None]
    y = (
        ops.linear(x, weights, packed(*biases) if biases else None)
        if scale is None
        else ops.quantized_linear(x, weights, scale)
    )
    return y.split([len(module.weight) for module in modules], dim=-1)


def _stored(x: Residual) -> Tensor:
    """A tensor of the residual stream's shape, dtype and device."""
    return x if isinstance(x, Tensor) else x.x


def _rows(x: Residual, norm: RMSNorm):
    """The input of a fused kernel that begins with norm(x)."""
    from .kernels.gemv_input import GemvInput

    if isinstance(x, Tensor):
        return GemvInput(x.flatten(0, -2).contiguous(), None, None, norm.weight, norm.eps)
    assert x.norm is not None
    assert x.norm.eps == norm.eps
    return GemvInput(
        x.x.flatten(0, -2), x.branch.flatten(0, -2), x.norm.weight, norm.weight, norm.eps, x.squares
    )
