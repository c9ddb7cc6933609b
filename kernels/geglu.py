"""GeGLU's elementwise part: gelu_tanh(gate) * up.

gate, up, out (N, M). tanh(z) = 2 sigmoid(2z) - 1, so gelu_tanh(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715
x^3)). Arithmetic is float32, with one rounding at the store. Moves 3 x N x M x itemsize bytes."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def gated(gate, up):
    z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    return gate * tl.sigmoid(z) * up


@triton.jit
def geglu_kernel(gate_ptr, up_ptr, out_ptr, M, stride, BLOCK: tl.constexpr):
    blocks = tl.cdiv(M, BLOCK)  # in a row. All rows share the grid's first axis: the others end at 65,535
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    gate = tl.load(gate_ptr + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * M + i, gated(gate, up).to(out_ptr.dtype.element_ty), mask=inside)


def geglu(gate: Tensor, up: Tensor) -> Tensor:  # (..., M) twice -> (..., M)
    """gelu_tanh(gate) * up. Both tensors have the same shape, strides, dtype and device. Their rows are
    contiguous; there may be gaps between rows."""
    assert gate.shape == up.shape
    assert gate.dtype == up.dtype
    assert gate.device == up.device
    assert gate.stride() == up.stride()
    rows = gate.view(1, -1) if gate.is_contiguous() else gate.view(-1, gate.shape[-1])
    out = gate.new_empty(gate.shape)
    assert rows.stride(1) == 1, f"strides {gate.stride()}"
    (N, M), stride = rows.shape, rows.stride(0)
    geglu_kernel[(N * triton.cdiv(M, BLOCK),)](gate, up, out, M, stride, BLOCK=BLOCK, num_warps=8)
    return out
