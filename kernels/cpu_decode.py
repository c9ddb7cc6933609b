"""The operations of a decode step on a CPU, in Numba: for one token of each of up to 16 rows in bfloat16, as
calls of kernels that are listed once, and run for every token.

The products are those of cpu_gemv.py, cpu_few_rows.py, cpu_int8.py and cpu_int4.py; cpu_between.py has what
stands between them. All calls read and write memory that stays where it is, so Python does nothing between
them but call. After each product, the caches hold weights, and torch's and Python's own code and data come
from memory: on Zen 3, whose kernels take 55 ms for a token of PaliGemma 3B with 4-bit weights, views, checks
and memory for results took another 20 ms."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import cpu_few_rows, cpu_gemv, cpu_int4, cpu_int8, cpu_operand
from .cpu_between import add_rows, attend_rows, geglu_rows, logits_rows, norm_rows, rope_rows, widen_rows
from .cpu_gemv import BESIDE, TileTypes, run
from .cpu_vectors import LANES, STORED, converts_halves

MOST_ROWS = 16
MULTIPLE = 8 * LANES  # features of a vector of 4-bit weights, which are whole vectors of all others
NOTHING = np.empty(0, np.uint16)
Weight = tuple[Tensor, Tensor | None]  # and its scale
Norm = tuple[Tensor, float]  # its weight, and eps


def takes(weight: torch.dtype, features: int) -> bool:
    known = weight in (torch.bfloat16, torch.int8, cpu_int4.WORDS)
    known = known or (weight == torch.float8_e4m3fn and converts_halves())
    return known and features % MULTIPLE == 0


def _bits(x: Tensor) -> np.ndarray:
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous()
    return x.view(torch.uint16).numpy()


class Calls:
    """Calls that compute on R rows, with some threads. Each method adds the calls of an operation, and
    returns the memory of its result, in which the next operation of the same kind has its result too."""

    def __init__(self, rows: int, threads: int):
        assert 0 < rows <= MOST_ROWS
        self.rows, self.threads, self.counter = rows, threads, np.zeros(1, np.int64)
        self.calls: list[tuple[Callable, tuple]] = []
        self.memory: dict[tuple, Tensor] = {}

    def run(self) -> None:
        for function, arguments in self.calls:
            run(function, *arguments)

    def norm_qkv_rope(
        self, x: Tensor, norm: Norm, projections: Sequence[Weight], rotation: Tensor, positions: Tensor,
        keys: Tensor, values: Tensor,
    ) -> Tensor:  # fmt: skip
        """The queries of norm(x), rotated by rotation (2, R, D/2): (R, E) -> (R, H, D). Writes keys and
        values at positions (R,), which must be less than S, of the caches (R, S, K, D)."""
        (R, _, K, D), given = keys.shape, (rotation, positions)
        assert (R, keys.shape) == (self.rows, values.shape)
        assert [len(weight) for weight, _ in projections[1:]] == [K * D, K * D]
        assert (rotation.shape, positions.shape) == ((2, R, D // 2), (R,))
        assert all(y.is_contiguous() for y in given)
        assert [y.dtype for y in given] == [torch.float32, torch.int64]
        q = self._memory("queries", self.rows, len(projections[0][0]) // D, D)
        products = self._products(self._normed(x, norm), projections)
        places = rotation.numpy(), positions.numpy()
        self._add(rope_rows, *products, *places, _bits(keys), _bits(values), _bits(q))
        return q

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, limit: Tensor, scale: float,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """ops.attention: (R, H, D), (R, S, K, D) twice -> (R, H * D). Each row attends to the positions from
        start (R,) up to, but not including, limit (R,), which must be positions of the caches."""
        out, given = self._memory("attended", self.rows, q.shape[1] * q.shape[2]), (start, limit)
        assert len(q) == len(keys) == self.rows
        assert (keys.shape, keys.shape[3]) == (values.shape, q.shape[2])
        assert all((y.shape, y.dtype) == ((self.rows,), torch.int64) and y.is_contiguous() for y in given)
        places = start.numpy(), limit.numpy()
        self._add(
            attend_rows, _bits(q), _bits(keys), _bits(values), *places, scale, softcap or 0.0, _bits(out)
        )
        return out

    def project_add(self, x: Tensor, weight: Weight, residual: Tensor, norm: Norm | None) -> Tensor:
        """residual + the product, or + its norm: (R, K), (R, E) -> (R, E)."""
        assert residual.shape == (self.rows, len(weight[0]))
        assert norm is None or len(norm[0]) == len(weight[0])
        names = ("residual", "other residual")  # a sum is not written over the residual that it reads
        out = next(y for y in (self._memory(name, *residual.shape) for name in names) if y is not residual)
        post, eps = (NOTHING, 0.0) if norm is None else (_bits(norm[0]), norm[1])
        self._add(add_rows, *self._products(x, (weight,)), _bits(residual), post, eps, _bits(out))
        return out

    def norm_geglu(self, x: Tensor, norm: Norm, gate: Weight, up: Weight) -> Tensor:
        """gelu_tanh(gate(norm(x))) * up(norm(x)): (R, E) -> (R, M)."""
        assert len(gate[0]) == len(up[0])
        assert len(gate[0]) % LANES == 0
        out = self._memory("hidden", self.rows, len(gate[0]))
        products = self._products(self._normed(x, norm), (gate, up))
        self._add(geglu_rows, *products, _bits(out), (0,) * LANES)
        return out

    def norm_head(self, x: Tensor, norm: Norm, weight: Weight) -> Tensor:
        """The product of the head and norm(x), rounded to bfloat16: (R, E) -> (R, V) float32."""
        out = self._memory("logits", self.rows, len(weight[0]), dtype=torch.float32)
        self._add(logits_rows, *self._products(self._normed(x, norm), (weight,)), out.numpy())
        return out

    def _add(self, function: Callable, *arguments) -> None:
        self.calls.append((function, arguments))

    def _memory(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Zeros, or the memory of this name that an earlier call wrote. NumPy's memory is not aligned to
        vectors: 8 rows of 4-bit weights took 1.5 times as long with it."""
        key = (name, shape, dtype)
        if key not in self.memory:
            self.memory[key] = torch.zeros(shape, dtype=dtype, device="cpu")
        return self.memory[key]

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:  # (R, E) -> (R, E)
        weight, eps = norm
        assert weight.shape == x.shape[1:]
        out = self._memory("normed", *x.shape)
        self._add(norm_rows, _bits(x), _bits(weight), eps, _bits(out))
        return out

    def _products(self, x: Tensor, weights: Sequence[Weight]) -> list[np.ndarray]:
        """For each weight, its products with x (R, K), float32 (R or more, N or more), and the scales that
        they lack, which may be none."""
        made, ready = [], {}
        assert len(x) == self.rows
        for i, (weight, scale) in enumerate(weights):
            (N, width), dtype, K = weight.shape, weight.dtype, x.shape[1]
            assert takes(dtype, K)
            assert weight.is_contiguous()
            assert width * (cpu_int4.CODES if dtype == cpu_int4.WORDS else 1) == K
            if dtype not in ready:
                ready[dtype] = self._operand(x, dtype)
            operand, kernel, parts, tile = ready[dtype]
            rows = -(-self.rows // len(tile[0])) * len(tile[0])  # of whole tiles
            if dtype == cpu_int4.WORDS:
                assert scale is not None
                assert scale.shape == (N, K // cpu_int4.GROUP)
                sums = self._memory(f"sums {i}", rows, N, dtype=torch.float32).numpy()
                ends = cpu_int4.ends_of_parts(N // len(tile[1]), self.threads)
                arguments = weight.numpy(), _bits(scale), sums, self.counter, ends, self.threads
                made += [sums, NOTHING]
            else:
                assert scale is None or scale.shape == (N,)
                sums = self._memory(f"sums {i}", rows, N + BESIDE, dtype=torch.float32).numpy()
                arguments = weight.view(STORED[dtype]).numpy(), sums, self.counter, self.threads
                made += [sums, NOTHING if scale is None else _bits(scale)]
            self._add(kernel, operand, *arguments, *parts, *tile)
        return made

    def _operand(
        self, x: Tensor, weight: torch.dtype
    ) -> tuple[np.ndarray, Callable, tuple[int, ...], TileTypes]:
        """x (R, K) as the products with such weights read it, their kernel, the numbers that tell it in which
        parts to multiply, and its tile."""
        R, K = x.shape
        if cpu_few_rows.takes(R, x.dtype, weight):
            tile, numbers = cpu_few_rows.tile_of(R)
            operand = self._memory("packed", K // len(numbers), len(tile[0]) * len(numbers))
            self._add(cpu_few_rows.pack, _bits(x), _bits(operand), numbers)
            return _bits(operand), cpu_few_rows.products, (), tile
        if weight == cpu_int4.WORDS or cpu_int8.takes(x.dtype, weight):
            module = cpu_int4 if weight == cpu_int4.WORDS else cpu_int8
            ordered = module.ordered(R, K, x.dtype)
            operand = self._memory("ordered", *ordered.sizes, dtype=ordered.dtype).numpy()
            values = _bits(x) if ordered.of_bits else self._widened(x, R)
            self._add(cpu_operand.order, values, operand, *ordered.order)
            return operand, module.products, ordered.parts, ordered.tile
        tile = cpu_gemv.tile_of(R)
        rows = -(-R // len(tile[0])) * len(tile[0])
        as_bits = cpu_gemv.reads_bits(x.dtype, weight)
        assert rows == R or not as_bits  # as cpu_few_rows computes on several rows there
        return _bits(x) if as_bits else self._widened(x, rows), cpu_gemv.products, (), tile

    def _widened(self, x: Tensor, rows: int) -> np.ndarray:
        """x (R, K) in float32 (rows, K); the further rows are 0."""
        out = self._memory("widened", rows, x.shape[1], dtype=torch.float32).numpy()
        self._add(widen_rows, _bits(x), out)
        return out
