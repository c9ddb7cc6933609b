"""The instructions by which torch multiplies matrices on this CPU."""

from functools import cache

import torch
import torch.nn.functional as F


@cache
def in_avx512() -> bool:
    """Whether torch multiplies bfloat16 matrices by AVX-512, without AMX."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and multiplies(torch.bfloat16)


@cache
def has_avx512() -> bool:
    """Whether torch computes with AVX-512."""
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype, bfloat16 or float16, by instructions of this CPU:
    bfloat16 with AVX512-BF16 and AMX, float16 with AVX512-FP16 and AMX."""
    if not has_avx512():
        return False
    mkldnn, short = torch.ops.mkldnn, dtype == torch.bfloat16
    if not (mkldnn._is_mkldnn_bf16_supported() if short else mkldnn._is_mkldnn_fp16_supported()):
        return False
    if short and not torch.cpu._is_avx512_bf16_supported():
        return False  # oneDNN does without them, at 55 GFLOP/s on Ice Lake, where float32 reaches 205
    x = torch.ones(16, 64, dtype=dtype, device="cpu")
    try:  # torch relies on the instructions even if ONEDNN_MAX_CPU_ISA hides them
        return bool((F.linear(x, x) == 64).all())
    except RuntimeError:
        return False
