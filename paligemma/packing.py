"""Stores weights that one product reads, such as those of q, k and v, in one allocation. The modules' weights
are views of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import Linear


def pack(linears: Sequence[Linear]) -> None:
    """Move the weights of these modules into one allocation, and their scales and biases likewise."""
    for name in ("weight", "weight_scale", "bias"):
        parts = [part for linear in linears if (part := getattr(linear, name)) is not None]
        if parts:
            for part, view in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                part.data = view


def is_packed(linears: Sequence[Linear]) -> bool:
    return packed(*(linear.weight for linear in linears)) is not None


def packed_weights(linears: Sequence[Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights of these modules as one tensor, and their scales if they are quantised. Packs them if they
    are not packed, as in a copied model."""
    weights = packed(*(linear.weight for linear in linears))
    if weights is None:
        pack(linears)
        return packed_weights(linears)
    scales = [linear.weight_scale for linear in linears if linear.weight_scale is not None]
    scale = packed(*scales) if scales else None
    assert (scale is None) == (not scales), "the weights are packed and their scales are not"
    return weights, scale


def packed(*parts: Tensor) -> Tensor | None:
    """The parts as one tensor if they follow one another in one allocation; otherwise None."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        together = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not together or part.storage_offset() != end or not part.is_contiguous():
            return None
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
