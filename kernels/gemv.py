"""The product that the fused kernels of a decode share: up to 16 rows times a weight matrix, each value of
which is read once.

    out[r, n] = scale[n] sum_k z[r, k] w[n, k]
    z = x, norm(x), or norm(x + norm'(branch)),    norm(x) = x / rms(x) * (1 + weight)

x, branch (R, K), R up to 16; w (N, K) in x's dtype, or in int8 or e4m3 with a scale for each row, or 4-bit
with a scale for each 32 weights of a row (gemv_int4.py). A program
computes a block of outputs. It loads its first two tiles of w before it reads the activations and, with
programmatic dependent launch, before the kernel that computes the activations has ended. Later tiles come
through shared memory, two or three tiles ahead.

The first two tiles are used outside of any loop: in a loop, ptxas moves the loads of the next tile after most
of the arithmetic of the current tile, so that each tile costs the latency of memory.

One row is multiplied and summed in float32, by FMA. Several rows, and the one row of some 8-bit matrices
(gemv_tile.py), are rounded to x's dtype, padded to 4, 8 or 16 rows and multiplied by tl.dot. The norm is
applied to the sums; only with float16, which may not hold the rows before they are normalised, is it applied
before the product. Every program computes the norm of x itself, from rows that are in the L2 cache by then;
the sum of squares of a branch comes from the kernel that computed the branch."""

import triton
import triton.language as tl

from .common import launch_dependents, wait_for_dependencies
from .gemv_input import features, inverse_of_parts, inverse_rms
from .gemv_int4 import GROUP, by_dot, by_fma, exact, scales_of_groups, words


@triton.jit
def tile(
    w_ptr, scale_ptr, place: tl.constexpr, given, block, first,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALL_WANTED: tl.constexpr,
    BY_DOT: tl.constexpr,
):  # fmt: skip
    """A tile of w: the rows of a block, and BLOCK_K features from `first` on -> (BLOCK_N, BLOCK_K) and 0, or
    words and scales as in gemv_int4.py."""
    if w_ptr.dtype.element_ty == tl.int32:
        return (
            words(w_ptr, place, given, block, first, K, BLOCK_N, BLOCK_K, ALL_WANTED, BY_DOT),
            scales_of_groups(scale_ptr, place, given, block, first, K, BLOCK_N, BLOCK_K, ALL_WANTED),
        )
    else:
        n, wanted = place(block, given, BLOCK_N)
        k = first + tl.arange(0, BLOCK_K)[None, :]
        inside = tl.full([1, 1], True, tl.int1)
        if not ALL_WANTED:
            inside &= wanted[:, None]
        if K % BLOCK_K != 0:
            inside &= k < K
        address = w_ptr + n.to(tl.int64)[:, None] * K + k
        return tl.load(
            address, mask=inside, other=0.0, eviction_policy="evict_first"
        ), 0.0  # not None: Triton 3.6


@triton.jit
def wide(w):
    """Weights in float32. The bits of an int8 w become those of the float32 2^23 + 128 + w, from which 2^23 +
    128 is subtracted, because the conversion instruction has an eighth of the rate."""
    if w.dtype == tl.int8:
        return ((w.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    else:
        return w.to(tl.float32)


@triton.jit
def terms(w, scale, z, R, dtype: tl.constexpr):
    """For one row: a tile, and z (1, BLOCK_K) float32 -> what is summed over the tiles and over axis 1 to
    give the outputs, (BLOCK_N, ...) float32."""
    if w.dtype != tl.int32:
        return wide(w) * z
    elif dtype == tl.float32:
        return exact(w, scale) * z
    else:
        return by_fma(w, scale, z, R)


@triton.jit
def product(w, scale, z, R, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    """A tile, and z (BLOCK_R, BLOCK_K) float32 -> (BLOCK_R, BLOCK_N) float32, or as by_dot returns it."""
    if BLOCK_R == 1:
        return tl.sum(terms(w, scale, z, R, dtype), axis=1)[None, :]
    elif w.dtype != tl.int32:
        return tl.dot(z.to(dtype), tl.trans(w.to(dtype)), input_precision="ieee")
    elif dtype == tl.float32:
        return tl.dot(z, tl.trans(exact(w, scale)), input_precision="ieee")
    else:
        return by_dot(w, scale, z, R, dtype)


@triton.jit
def scales(
    w_ptr, scale_ptr, place: tl.constexpr, given, block, BLOCK_N: tl.constexpr
):  # -> (1, BLOCK_N) or 1
    if scale_ptr is None or w_ptr.dtype.element_ty == tl.int32:
        return 1.0
    else:
        n, wanted = place(block, given, BLOCK_N)
        return tl.load(scale_ptr + n, mask=wanted, other=0.0).to(tl.float32)[None, :]


@triton.jit
def gemv(
    x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, sum_ptr, w_ptr, scale_ptr,
    place: tl.constexpr, finish: tl.constexpr, given, R, eps,
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr,
    ONE: tl.constexpr, ALL_WANTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """place(block, given, BLOCK_N) returns the rows n (BLOCK_N,) of w that belong to a block, and whether
    each is wanted. finish(outputs (BLOCK_R, BLOCK_N) float32, block, given, R) stores the outputs, or what it
    computes from them. ALL_WANTED: in every block, all rows are wanted.

    The first tile has FIRST features, the second the next SECOND. If K is larger than both, SECOND equals
    FIRST, and the later tiles have FIRST features each and are loaded STAGES - 1 tiles ahead. ONE: there is
    one row, whatever BLOCK_R is."""
    launch_dependents(PDL)
    block = tl.program_id(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # tl.dot with 4-bit weights needs each row once for each group of a tile, in another order of the features
    GROUPS: tl.constexpr = w_ptr.dtype.element_ty == tl.int32 and BLOCK_R > 1 and dtype != tl.float32
    ROWS: tl.constexpr = BLOCK_R * GROUP // FIRST if GROUPS else BLOCK_R
    NORM_R: tl.constexpr = 1 if ONE else ROWS
    NORM_K: tl.constexpr = 1024 if ONE else 128
    w, s = tile(w_ptr, scale_ptr, place, given, block, 0, K, BLOCK_N, FIRST, ALL_WANTED, GROUPS)
    if SECOND:
        w2, s2 = tile(w_ptr, scale_ptr, place, given, block, FIRST, K, BLOCK_N, SECOND, ALL_WANTED, GROUPS)
    wait_for_dependencies(PDL)
    if not PDL:
        tl.debug_barrier()  # as a wait does, it keeps ptxas from moving loads of weights after arithmetic
    scale = scales(w_ptr, scale_ptr, place, given, block, BLOCK_N)
    branch_scale = 1.0
    if branch_ptr is not None:
        branch_scale = inverse_of_parts(squares_ptr, R, eps, K, PARTS, NORM_R, BLOCK_PARTS)
    # Whether rows are normalised before the product: float16 may not hold them before.
    BEFORE: tl.constexpr = BLOCK_R > 1 and dtype == tl.float16
    before = 1.0
    if norm_ptr is not None and BEFORE:
        before = inverse_rms(x_ptr, branch_ptr, post_ptr, branch_scale, R, eps, K, NORM_R, NORM_K)
    NORM: tl.constexpr = norm_ptr is not None and not BEFORE
    after = 1.0
    z, weighted = features(
        x_ptr, branch_ptr, post_ptr, norm_ptr, sum_ptr, branch_scale, R, 0, K, ROWS, FIRST, GROUPS
    )
    if FIRST + SECOND < K and BLOCK_R == 1:
        tl.static_assert(norm_ptr is None)
        sums = terms(w, s, z, R, dtype)
        z, _ = features(x_ptr, None, None, None, None, 1.0, R, FIRST, K, BLOCK_R, FIRST)
        sums += terms(w2, s2, z, R, dtype)
        for first in tl.range(2 * FIRST, K, FIRST, num_stages=STAGES):
            w, s = tile(w_ptr, scale_ptr, place, given, block, first, K, BLOCK_N, FIRST, ALL_WANTED, GROUPS)
            z, _ = features(x_ptr, None, None, None, None, 1.0, R, first, K, BLOCK_R, FIRST)
            sums += terms(w, s, z, R, dtype)
        out = tl.sum(sums, axis=1)[None, :]
    else:
        if NORM:
            squares = z * z if BLOCK_R > 1 else tl.sum(z * z, axis=1)[:, None]
        out = product(w, s, weighted * before, R, BLOCK_R, dtype)
        if SECOND:
            z, weighted2 = features(
                x_ptr, branch_ptr, post_ptr, norm_ptr, sum_ptr, branch_scale, R, FIRST,
                K, ROWS, SECOND, GROUPS,
            )  # fmt: skip
            if NORM:
                squares += z * z if BLOCK_R > 1 else tl.sum(z * z, axis=1)[:, None]
            out += product(w2, s2, weighted2 * before, R, BLOCK_R, dtype)
        if FIRST + SECOND < K:
            for first in tl.range(FIRST + SECOND, K, FIRST, num_stages=STAGES):
                w, s = tile(
                    w_ptr, scale_ptr, place, given, block, first, K, BLOCK_N, FIRST, ALL_WANTED, GROUPS
                )
                z, weighted3 = features(
                    x_ptr, branch_ptr, post_ptr, norm_ptr, sum_ptr, branch_scale, R, first,
                    K, ROWS, FIRST, GROUPS,
                )  # fmt: skip
                if NORM:
                    squares += z * z
                if not GROUPS:  # noqa: SIM114  the next condition is not known at compile time
                    out += product(w, s, weighted3 * before, R, BLOCK_R, dtype)
                elif R > 0:  # always. Without a tl.dot in the loop itself, Triton loads the scales ahead too
                    out += product(w, s, weighted3 * before, R, BLOCK_R, dtype)
        if GROUPS:
            out = tl.sum(out.reshape(ROWS, BLOCK_R // ROWS, BLOCK_N), axis=1)
        if NORM:
            after = tl.rsqrt((tl.sum(squares, axis=1)[:, None] if BLOCK_R > 1 else squares) / K + eps)
    finish(out * (after * scale), block, given, R)
