"""Quantises weights: to 8 bits, the nearest int8 or e4m3 values with one scale for each row; or to 4 bits."""

import torch
from torch import Tensor

from .. import cpu_linear, int4

# Values of a weight that are converted at a time: 2 MB in float32, in a CPU's cache; fewer launches on a GPU.
BLOCK, GPU_BLOCK = 1 << 19, 1 << 25


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales for a model that computes in `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def quantized(weight: Tensor, stored: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight (N, K) in the dtype `stored`, and its scales, for a model that computes in `dtype`.

    stored: int8, e4m3, or int32 for 4-bit numbers."""
    if _by_numba(weight):
        from ..kernels.cpu_quantize import cpu_quantize_groups, cpu_quantize_rows

        if stored == int4.STORED:
            return cpu_quantize_groups(weight.detach())
        return cpu_quantize_rows(weight.detach(), stored, scale_dtype(dtype))
    if stored == int4.STORED:
        return int4.quantized_groups(weight)
    return quantized_rows(weight, stored, dtype)


def _by_numba(weight: Tensor) -> bool:
    """Whether the Numba kernels quantise this weight. If it is finite, the result is the same to the bit."""
    if weight.device.type != "cpu" or weight.numel() < cpu_linear.LARGE or not cpu_linear.kernels_run():
        return False
    from ..kernels.cpu_quantize import takes

    return takes(weight)


def shapes(
    rows: int, features: int, stored: torch.dtype, dtype: torch.dtype
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """The shape and dtype of what `quantized` returns: of the weight, and of its scales."""
    if stored == int4.STORED:
        return ((rows, features // 8), stored), ((rows, features // int4.GROUP), torch.bfloat16)
    return ((rows, features), stored), ((rows,), scale_dtype(dtype))


def quantized_rows(
    weight: Tensor, stored: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # (out, in) -> (out, in), (out,)
    """The weight as the nearest values of the dtype `stored`, each to be multiplied by the scale of its row.

    stored: int8 (-127 to 127) or e4m3 (3 bits of mantissa, up to 448). The scales are float32; for dtype
    bfloat16 they are bfloat16, as the CPU's product requires. Some rows are converted at a time, in memory
    that stays in the cache and that the next rows reuse: 16384 x 2048 take 12 ms on two Zen 4 cores, and with
    new memory for each operation 410 ms. See also kernels/cpu_quantize.py."""
    (N, K), kept = weight.shape, scale_dtype(dtype)
    largest = torch.finfo(stored).max if stored.is_floating_point else torch.iinfo(stored).max
    values = torch.empty_like(weight, dtype=stored)
    scales = torch.empty(N, dtype=kept, device=weight.device)
    block = BLOCK if weight.device.type == "cpu" else GPU_BLOCK
    step = max(1, min(N, block // max(1, K)))
    memory = torch.empty(2, step, K, dtype=torch.float32, device=weight.device)
    for start in range(0, N, step):
        part = slice(start, start + step)
        rows, magnitudes = memory[:, : len(weight[part])]
        torch.abs(rows.copy_(weight[part]), out=magnitudes)
        scale = (magnitudes.amax(dim=1) / largest).clamp_(min=torch.finfo(kept).tiny).to(kept)
        rows.div_(scale.float()[:, None]).clamp_(-largest, largest)
        values[part] = rows if stored.is_floating_point else rows.round_()
        scales[part] = scale
    return values, scales
