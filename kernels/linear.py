"""A linear layer for the many rows of a prefill, in tiles small enough that every SM has one.

    out[m, n] = act(sum_k x[m, k] w[n, k] + bias[n]),    act is the identity or GELU's tanh form

x (M, K); w (N, K); bias (N,); out (M, N). A program computes one tile of the output. Where there are fewer
tiles than SMs, several programs share the features of each tile: their float32 sums go to a workspace, and a
second kernel adds them in the order of the splits. Arithmetic is float32, with one rounding at the store.
Moves (M x K + N x K + M x N) x itemsize bytes, and with splits 8 x M x N x splits bytes within the L2 cache.
On sm_90, tiles of x and w are loaded through TMA descriptors."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import architecture
from .geglu import gated


class Form(NamedTuple):
    """How the work is divided: a program's tile, and how many programs share its features."""

    rows: int
    outputs: int
    features: int  # multiplied at a time
    stages: int  # how many such loads of features are in flight
    warps: int
    splits: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.outputs}x{self.features}" + f", {self.splits} splits" * (self.splits > 1)


# The products that this kernel computes: (rows, outputs, features) -> compute capability -> the form that was
# measured to be faster than cuBLAS there. `python -m benchmarks.measure --only ceilings crossover` prints
# such lines. All other products are left to cuBLAS.
FORMS: dict[tuple[int, int, int], dict[int, Form]] = {}


def measured(x: Tensor, weight: Tensor) -> Form | None:
    """The form for x (M, K) and a weight (N, K); None if cuBLAS is faster, if nobody has measured, or for
    float32."""
    forms = FORMS.get((nearest(len(x)), *weight.shape))
    return None if forms is None or x.dtype == torch.float32 else forms.get(architecture())


def nearest(rows: int) -> int:
    """The power of two that stands for a number of rows: 256 for 182 to 362 rows."""
    return 1 << round(math.log2(max(rows, 1)))


@triton.jit(do_not_specialize=["M"])  # one kernel for prompts of every length
def linear_kernel(
    x_ptr, w_ptr, x_tiles, w_tiles, bias_ptr, out_ptr, M, N, K, per_split,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums of split s of the features are stored in out_ptr[s], (M, N)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Programs that run at the same time share the weights of a few tiles and the rows of GROUP tiles.
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP)
    within = tile % (GROUP * tiles_n)
    from_m, from_n = (first_m + within % group) * BLOCK_M, within // group * BLOCK_N
    m, n, k = from_m + tl.arange(0, BLOCK_M), from_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_rows, w_rows = x_ptr + m.to(tl.int64)[:, None] * K, w_ptr + n.to(tl.int64)[:, None] * K

    begin = split * per_split
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(begin, tl.minimum(begin + per_split, K), BLOCK_K, num_stages=STAGES):
        if TMA:  # loads zeros after the last row and the last feature
            x, w = x_tiles.load([from_m, first]), w_tiles.load([from_n, first])
        else:
            here = (first + k)[None, :]
            x = tl.load(x_rows + here, mask=(m < M)[:, None] & (here < K), other=0.0)
            w = tl.load(w_rows + here, mask=(n < N)[:, None] & (here < K), other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")

    out_ptr += split.to(tl.int64) * M * N
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(
        out_ptr + place,
        finished(acc, bias_ptr, n[None, :], N, GELU).to(out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


@triton.jit
def sum_kernel(
    part_ptr, bias_ptr, out_ptr, M, N, SPLITS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(N, BLOCK)  # in a row
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(part_ptr + (split * M + row) * N + n, mask=n < N, other=0.0)
    tl.store(
        out_ptr + row * N + n, finished(acc, bias_ptr, n, N, GELU).to(out_ptr.dtype.element_ty), mask=n < N
    )


@triton.jit
def finished(acc, bias_ptr, n, N, GELU: tl.constexpr):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if GELU:
        acc = gated(acc, 1.0)
    return acc


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, gelu: bool = False) -> Tensor:
    """x (M, K), weight (N, K), bias (N,) -> (M, N). All contiguous, of one dtype, on one device."""
    (M, K), N = x.shape, len(weight)
    assert weight.shape == (N, K), f"weight {tuple(weight.shape)} for {K} features"
    assert bias is None or bias.shape == (N,)
    given = [x, weight] if bias is None else [x, weight, bias]
    assert all(a.dtype == x.dtype and a.device == x.device and a.is_contiguous() for a in given)
    tiles, blocks = triton.cdiv(M, form.rows) * triton.cdiv(N, form.outputs), triton.cdiv(K, form.features)
    per_split = triton.cdiv(blocks, form.splits)
    splits = triton.cdiv(blocks, per_split)  # none of them empty
    aligned = all(a % 16 == 0 for a in (x.data_ptr(), weight.data_ptr(), K * x.itemsize))
    # sm_100 has TMA too, but there Triton 3.8 spills a register with tiles of 128 x 128.
    tma = 90 <= architecture() < 100 and x.itemsize == 2 and aligned
    x_tiles, w_tiles = (
        TensorDescriptor(a, [len(a), K], [K, 1], [size, form.features]) if tma else a
        for a, size in ((x, form.rows), (weight, form.outputs))
    )
    out = x.new_empty(M, N)
    parts = out if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    linear_kernel[(tiles, splits)](
        x, weight, x_tiles, w_tiles, bias if splits == 1 else None, parts, M, N, K, per_split * form.features,
        GELU=gelu and splits == 1, BLOCK_M=form.rows, BLOCK_N=form.outputs, BLOCK_K=form.features,
        GROUP=8, TMA=tma, STAGES=form.stages, num_warps=form.warps,
    )  # fmt: skip
    if splits > 1:
        block = min(triton.next_power_of_2(N), 1024)
        sum_kernel[(M * triton.cdiv(N, block),)](
            parts, bias, out, M, N, SPLITS=splits, GELU=gelu, BLOCK=block, num_warps=4
        )
    return out
