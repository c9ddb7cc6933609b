"""Quantises weights to 8 bits: the nearest int8 or e4m3 values, and one scale for each row."""

import torch
from torch import Tensor


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales for a model that computes in `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def quantized_rows(
    weight: Tensor, stored: torch.dtype, dtype: torch.dtype, step: int = 4096
) -> tuple[Tensor, Tensor]:  # (out, in) -> (out, in), (out,)
    """The weight as the nearest values of the dtype `stored`, each to be multiplied by the scale of its row.
    `step` rows are converted at a time.

    stored: int8 (-127 to 127) or e4m3 (3 bits of mantissa, up to 448). The scales are float32; for dtype
    bfloat16 they are bfloat16, as the CPU's product requires."""
    kept = scale_dtype(dtype)
    largest = torch.finfo(stored).max if stored.is_floating_point else torch.iinfo(stored).max
    out, scales = torch.empty_like(weight, dtype=stored), []
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        scale = (rows.abs().amax(dim=1) / largest).clamp(min=torch.finfo(kept).tiny).to(kept)
        rows = (rows / scale.float()[:, None]).clamp_(-largest, largest)
        out[start : start + step] = rows if stored.is_floating_point else rows.round_()
        scales.append(scale)
    return out, torch.cat(scales)
