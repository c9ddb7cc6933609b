"""GeGLU's elementwise part: gelu_tanh(gate) * up.

gate, up, out (N elements). tanh(z) as 2 sigmoid(2z) - 1, so gelu_tanh(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
float32 inside, one rounding at the store. Moves 3 x N x itemsize bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def geglu_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    tl.store(out_ptr + i, (gate * tl.sigmoid(z) * up).to(out_ptr.dtype.element_ty), mask=inside)


def geglu(gate: Tensor, up: Tensor) -> Tensor:  # (..., M) twice -> (..., M)
    """gelu_tanh(gate) * up, for contiguous tensors of one shape, dtype and device."""
    assert gate.shape == up.shape
    assert gate.dtype == up.dtype
    assert gate.device == up.device
    assert gate.is_contiguous()
    assert up.is_contiguous()
    out = torch.empty_like(gate)
    geglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=8)
    return out
