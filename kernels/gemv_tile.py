"""How `gemv` cuts a matrix into tiles.

At least 48 KB of weights for each SM are requested before the wait, or all of a smaller matrix. Programs that
run long are few enough to run all at once.

One row is multiplied by FMA if the weights have 16 bits or more. FMA takes 5 to 7 instructions for an 8-bit
weight and tl.dot 2 to 4, and an H200 issues 6.9 in the time that a weight takes: an 8-bit matrix is
multiplied by tl.dot, even for one row, where tiles of tl.dot are large enough for 48 KB. 4-bit weights take
4 to 6 instructions by FMA, in which what a program does once has a large share, and 3 by tl.dot."""

from typing import NamedTuple

import torch
import triton

from .common import architecture

HELD = 5120  # the most features of a row that a program keeps in its registers
MANY = 16384  # outputs of a 4-bit matrix, from which on even one row is multiplied by tl.dot


class Tile(NamedTuple):
    """The rows and outputs of a program's block, and the features of its first and its second tile."""

    rows: int
    outputs: int
    first: int
    second: int  # 0 if the first tile has all features
    warps: int
    stages: int = 4

    @classmethod
    def of(cls, R: int, N: int, K: int, dtype: torch.dtype, weight: torch.dtype) -> "Tile":
        """For R rows in `dtype` and a matrix (N, K) in the dtype `weight`."""
        size, large = weight.itemsize, N >= 8192
        output_projection = 3584 <= N < 8192 and K <= HELD and largest(K) >= 1024  # of 10B and 28B
        by_fma = size > 1 or dtype == torch.float32 or not (large or output_projection)
        interpreted = architecture() == 0  # there, the larger the blocks, the faster
        if weight == torch.int32:
            return cls.int4(R, N, K, dtype, interpreted)
        if R == 1 and by_fma:
            tile = cls.one_row(N, K, size)
            return tile._replace(outputs=512) if interpreted and K <= HELD else tile
        if interpreted:
            first = min(max(16, largest(K)), 1024)
            return cls(16, 512, first, first if first < K else 0, 4)
        if dtype == torch.float32:  # products are computed by FMA from registers, not by tensor cores
            return cls(16, 16 if weight == dtype else 32, 64, 64 if K > 64 else 0, 4)
        # As few rows as possible: each costs arithmetic for every tile.
        rows = min(16, max(4, triton.next_power_of_2(R)))
        outputs, first, stages = 16, 2048 // rows, 4
        if R == 1 and size == 1 and N < 16384 and largest(K) >= 512:  # qkv and output of 10B and 28B
            outputs, first, stages = 32, 1024, 3
        elif large:
            # The head, from 2^17 on, has so many programs that they need not run all at once.
            short = N >= 24576 and (R > 1 or N < 2**17)
            outputs, first = 64, 64 if rows == 16 or size > 1 else 128 if short else 256
        elif rows == 16 and size > 1 and N >= 4096:  # with 128 features, sm_100 spills registers of float16
            outputs, first, stages = 32, 64, 8
        if rows == 16 and size == 1:  # with 4 stages, Triton 3.8 spills a register of int8
            stages = 3
        first = min(first, max(16, largest(K)))
        return cls(rows, outputs, first, first if first < K else 0, 4, stages)

    @classmethod
    def one_row(cls, N: int, K: int, size: int) -> "Tile":
        """For FMA and a weight of `size` bytes."""
        if K > HELD:  # the down projection
            outputs = 4 if N <= 2640 else 8
            first = 8192 // outputs // size
            return cls(1, outputs, first, first, 4)
        most, warps = (20480, 4) if size > 1 or N >= 3584 else (10240, 2)  # bytes of a program's weights
        outputs = min(16, max(2, 1 << ((most // K // size).bit_length() - 1)))
        first = max(16, 1 << (K.bit_length() - 1))
        second = triton.next_power_of_2(max(16, K - first)) if first < K else 0
        return cls(1, outputs, first, second, warps)

    @classmethod
    def int4(cls, R: int, N: int, K: int, dtype: torch.dtype, interpreted: bool) -> "Tile":
        """For 4-bit weights. By FMA, a thread has the 32 features of a group in each row of the block. By
        tl.dot, a tile has 512 features, shared among the rows."""
        if R > 1 and dtype == torch.float32:
            return cls(16, 512 if interpreted else 32, 64, 64 if K > 64 else 0, 4)
        if R > 1 or (N >= MANY and dtype != torch.float32):
            rows = triton.next_power_of_2(R)
            outputs, first = (64, 512 // rows) if N >= 8192 else (32, 1024 // rows)
            outputs, first = 512 if interpreted else outputs, min(512, max(128, first))
            return cls(rows * first // 32, outputs, first, first if first < K else 0, 4, 3)
        if dtype == torch.float32:  # whose terms are as many as the weights
            first = 2048 if K > HELD else max(32, 1 << (K.bit_length() - 1))
            return cls(1, 512 if interpreted else 4, first, first if first < K else 0, 8)
        if K > HELD and N >= 3584:  # the down projections of 10B and 28B
            return cls(1, 8, 2048, 2048, 4)
        if K >= 12288:  # of PaliGemma 3B
            return cls(1, 8, 4096, 4096, 4, 3)
        outputs, warps = 16 if N >= 4096 else 8, 8 if K > HELD else 4 if N >= 3584 else 2
        first = max(32, 1 << (K.bit_length() - 1))
        second = triton.next_power_of_2(max(32, K - first)) if first < K else 0
        return cls(1, 512 if interpreted else outputs, first, second, warps)

    def options(self, R: int) -> dict[str, int]:
        """The constants of `gemv` for R rows."""
        return {
            "BLOCK_R": self.rows, "BLOCK_N": self.outputs, "FIRST": self.first, "SECOND": self.second,
            "STAGES": self.stages, "ONE": int(R == 1), "num_warps": self.warps,
        }  # fmt: skip


def largest(K: int) -> int:
    """The largest power of two that divides K if that is at least 128; else the next power of two from K
    on."""
    divisor = K & -K
    return divisor if divisor >= 128 else triton.next_power_of_2(K)
