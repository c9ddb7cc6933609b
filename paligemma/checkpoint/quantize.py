"""8-bit weights: the nearest numbers of int8 or e4m3, and a scale for each row."""

import torch
from torch import Tensor


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def quantized_rows(weight: Tensor, stored: torch.dtype, dtype: torch.dtype, step: int = 4096) -> tuple[Tensor, Tensor]:  # (out, in) -> (out, in), (out,)
    """The nearest numbers of `stored` (int8: integers from -127 to 127; e4m3: 3 bits after the point, up to
    448) times a scale for each row; some rows at a time. Scales are float32, and for bfloat16 numbers of
    that, as the CPU's product for it wants them."""
    kept, largest = scale_dtype(dtype), torch.finfo(stored).max if stored.is_floating_point else torch.iinfo(stored).max
    out, scales = torch.empty_like(weight, dtype=stored), []
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        scale = (rows.abs().amax(dim=1) / largest).clamp(min=torch.finfo(kept).tiny).to(kept)
        rows = (rows / scale.float()[:, None]).clamp_(-largest, largest)
        out[start : start + step] = rows if stored.is_floating_point else rows.round_()
        scales.append(scale)
    return out, torch.cat(scales)
