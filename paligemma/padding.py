"""Removes the padding of a batch, and checks the inputs of `forward` and `generate`."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import PaliGemmaConfig
from .errors import PaliGemmaError
from .fields import shown


class UnpaddedBatch(NamedTuple):
    """Each row's valid tokens, moved to the front. The places after a row's length are unused."""

    input_ids: Tensor  # (B, T), 0 at image tokens
    patch: Tensor  # (B, T), the index of the patch at each image token, among those of all images, or -1
    length: Tensor  # (B,), the number of valid tokens
    prefix: Tensor  # (B,), how many of them attend to one another; the others are a causal suffix
    origin: Tensor  # (B, T), the index of each token in the padded row

    def extended(self, T: int) -> "UnpaddedBatch":
        """The batch extended to T columns; the new columns are unused."""
        more = (0, T - self.input_ids.shape[1])
        ids, patch = F.pad(self.input_ids, more), F.pad(self.patch, more, value=-1)
        return self._replace(input_ids=ids, patch=patch, origin=F.pad(self.origin, more))

    def to(self, device: torch.device) -> "UnpaddedBatch":
        return UnpaddedBatch(*(x.to(device) for x in self))

    def padded(self, x: Tensor, T: int) -> Tensor:  # (B, T', ...) -> (B, T, ...)
        """Values x of this batch's tokens, moved to their places in the padded batch; zeros at its
        padding."""
        out = x.new_zeros(len(x), T, *x.shape[2:])
        row, t = (torch.arange(x.shape[1], device=x.device) < self.length[:, None]).nonzero(as_tuple=True)
        out[row, self.origin[row, t]] = x[row, t]
        return out


def unpad(
    config: PaliGemmaConfig, vocabulary: int, input_ids: Tensor, pixel_values: Tensor | None,
    attention_mask: Any, token_type_ids: Any,
) -> UnpaddedBatch:  # fmt: skip
    """The batch without its padding, on the device of input_ids, with the places of its images: the first
    images belong to the first row, as many as it has `<image>` tokens for. Raises PaliGemmaError unless the
    rows have as many of these tokens as the images have patches, and all ids are in the vocabulary."""
    device, masks = input_ids.device, {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
    batch = _unpad(input_ids, *(x if x is None else tensor(name, x).to(device) for name, x in masks.items()))
    valid = torch.arange(batch.input_ids.shape[1], device=batch.length.device) < batch.length[:, None]
    is_image = (batch.input_ids == config.image_token_index) & valid
    images = 0 if pixel_values is None else len(pixel_values)
    patches = config.vision_config.num_patches
    counts = is_image.sum(dim=1).tolist()
    if sum(counts) != images * patches or any(count % patches for count in counts):
        held = f"the rows of input_ids hold {counts} <image> tokens, for {images} images"
        raise PaliGemmaError(f"{held}; each image has {patches}")
    ids = batch.input_ids.masked_fill(is_image | ~valid, 0)
    patch = (is_image.flatten().cumsum(dim=0) - 1).view_as(is_image).masked_fill(~is_image, -1)
    # This check waits for the GPU, so another stream may read all that is computed here.
    if bool(((ids < 0) | (ids >= vocabulary)).any()):
        least, largest = int(ids.min()), int(ids.max())
        raise PaliGemmaError(f"input_ids go from {least} to {largest}; token ids are 0 to {vocabulary - 1}")
    return batch._replace(input_ids=ids, patch=patch)


def _unpad(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> UnpaddedBatch:
    """The batch (B, T) without its padding, before the ids of images are replaced. Raises PaliGemmaError if
    shapes differ, a row is empty, or a prefix token follows a suffix token."""
    valid = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        valid = flags("attention_mask", attention_mask)
    suffix = torch.zeros_like(valid) if token_type_ids is None else flags("token_type_ids", token_type_ids)
    if not input_ids.shape == valid.shape == suffix.shape or input_ids.ndim != 2:
        named = {"input_ids": input_ids, "attention_mask": valid, "token_type_ids": suffix}
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise PaliGemmaError(f"shapes that must all be one (B, T): {shapes}")
    length = valid.sum(dim=1)
    if not bool(length.all()):
        raise PaliGemmaError(f"row {int(length.argmin())} of attention_mask has no token at all")
    origin = (~valid).int().argsort(dim=1, stable=True)[:, : int(length.max())]
    suffix = (suffix & valid).gather(1, origin)
    prefix = length - suffix.sum(dim=1)
    position = torch.arange(origin.shape[1], device=origin.device)
    if bool((suffix & (position < prefix[:, None])).any()):
        raise PaliGemmaError("token_type_ids has a 0 after a 1: a prefix must come before its suffix")
    return UnpaddedBatch(input_ids.gather(1, origin), torch.full_like(origin, -1), length, prefix, origin)


def tensor(name: str, value: Any) -> Tensor:
    """A tensor from a tensor, an array or lists. Raises PaliGemmaError for any other value."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError, RuntimeError):  # no array, or one of a dtype that torch does not have
        wanted = "it must be a tensor, an array, or lists of one length"
        raise PaliGemmaError(f"{name} is {shown(value)}; {wanted}") from None


def token_ids(value: Any) -> Tensor:  # -> (B, T) int64
    """The input ids, checked."""
    ids = tensor("input_ids", value)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PaliGemmaError(f"input_ids are {ids.dtype}; token ids are whole numbers, such as int64")
    if ids.ndim != 2 or not ids.numel():
        wanted = "it must be (B, T), with at least one row and one token"
        raise PaliGemmaError(f"input_ids has shape {tuple(ids.shape)}; {wanted}")
    return ids.long()


def pixels(value: Any, size: int) -> Tensor | None:  # -> (I, 3, S, S)
    """The I images of all rows, checked; None if there are none."""
    if value is None:
        return None
    pixel_values = tensor("pixel_values", value)
    if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
        wanted = f"this model takes (I, 3, {size}, {size})"
        raise PaliGemmaError(f"pixel_values has shape {tuple(pixel_values.shape)}; {wanted}")
    if not pixel_values.is_floating_point():
        wanted = "they must be floating-point, and normalised: give the images to the processor"
        raise PaliGemmaError(f"pixel_values are {pixel_values.dtype}; {wanted}")
    if not bool(pixel_values.isfinite().all()):
        raise PaliGemmaError("pixel_values hold NaN or infinity: look at how the images were made")
    return pixel_values if len(pixel_values) else None


def flags(name: str, value: Tensor) -> Tensor:
    """A bool tensor from a tensor of 0 and 1, checked."""
    on = value != 0
    if not bool((on == value).all()):
        raise PaliGemmaError(f"{name} holds {value[on != value][0].item()}; it must hold 0 and 1 only")
    return on
