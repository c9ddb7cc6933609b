"""The reference's view of a checkpoint: parameters by name, widened when they are read, and results by the
same names.

Weights stay in the file. `p["weight"]` maps one tensor, widens it and releases the map, so that a 3B
checkpoint runs in a few gigabytes. Formulas end in `return p.emit(x)`. There, a result gets its name for
`record`, and is rounded if the reference computes the same formulas in a narrower dtype. The error of that
rounding is the measure for other implementations in that dtype."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoint.stored import CODESIZE, SCALE, StoredTensor
from ..errors import PaliGemmaError
from . import quantized

Array = np.ndarray
BLOCK = 256  # rows and columns of the sums that stay in the cache


def round_bfloat16(x: Array) -> Array:
    """x rounded to the nearest bfloat16, ties to even, stored as float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32)).reshape(np.shape(x))


def round_float16(x: Array) -> Array:
    """x rounded to the nearest float16, stored as float32."""
    return np.asarray(x, dtype=np.float16).astype(np.float32)


# dtype -> the dtype of the arithmetic, and the function that rounds each weight and result
ARITHMETIC: dict[str, tuple[type, Callable[[Array], Array] | None]] = {
    "float64": (np.float64, None),
    "float32": (np.float32, None),
    "bfloat16": (np.float32, round_bfloat16),
    "float16": (np.float32, round_float16),
}


def to_dtype(x: Array, dtype: str) -> Array:
    """x rounded to `dtype` (a key of ARITHMETIC), stored in the dtype of its arithmetic."""
    arithmetic, rounded = ARITHMETIC[dtype]
    return np.asarray(rounded(x) if rounded else x, dtype=arithmetic)


# The dtypes of arrays in files, by safetensors' words. Of bfloat16 and e4m3, which NumPy lacks, they are the
# bits.
FILES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
FILES |= {"I32": np.int32, "I8": np.int8, "F8_E4M3": np.uint8}


@dataclass(frozen=True)
class Params:
    """The parameters below one dotted name. `p / "mlp"` goes one level down; `p["weight"]` reads a tensor."""

    stored: dict[str, StoredTensor]
    dtype: str  # a key of ARITHMETIC
    name: str = ""
    record: dict[str, Array] | None = None

    def __truediv__(self, child: str | int) -> "Params":
        return replace(self, name=f"{self.name}.{child}" if self.name else str(child))

    def __getitem__(self, leaf: str) -> Array:
        return self.rows(leaf, ...)

    def __contains__(self, leaf: str) -> bool:
        return f"{self.name}.{leaf}" in self.stored

    def __len__(self) -> int:
        """The number of rows of this module's weight."""
        return self.stored[f"{self.name}.weight"].shape[0]

    def rows(self, leaf: str, rows: Any) -> Array:
        """The rows of a tensor that a NumPy index selects; the other rows are not widened."""
        tensor = self.stored[f"{self.name}.{leaf}"]
        if tensor.dtype in CODESIZE:
            return to_dtype(
                self._dequantized(tensor, self.stored[f"{self.name}.{leaf}{SCALE}"], rows), self.dtype
            )
        if tensor.update is None:
            return self._widen(tensor, _map(tensor)[rows])
        # A weight that an adapter changes is rounded once, after the change.
        exact, down, up = replace(self, dtype="float64"), tensor.update.down, tensor.update.up
        change = exact._widen(up, _map(up)[rows]) @ exact._widen(down, _map(down))
        return to_dtype(exact._widen(tensor, _map(tensor)[rows]) + tensor.update.scale * change, self.dtype)

    def blocks(self, leaf: str, size: int = 16384) -> Iterator[Array]:
        """A tensor, `size` rows at a time, for tensors that would take too much memory when widened."""
        for start in range(0, self.stored[f"{self.name}.{leaf}"].shape[0], size):
            yield self.rows(leaf, slice(start, start + size))

    def product(self, x: Array, w: Array) -> Array:  # (..., K), (K, N) -> (..., N)
        """x @ w. In float32 the terms of each sum are added one after another. NumPy's BLAS has another order
        on each kind of CPU, and the error in float32 depends on the order."""
        if self.dtype != "float32":
            return x @ w
        rows = x.reshape(-1, x.shape[-1])
        out = np.zeros((len(rows), w.shape[1]), np.float32)
        for first in range(0, out.shape[1], BLOCK):
            columns = np.ascontiguousarray(w[:, first : first + BLOCK])
            for start in range(0, len(rows), BLOCK):
                sums = out[start : start + BLOCK, first : first + BLOCK]
                for k, row in enumerate(columns):
                    sums += rows[start : start + BLOCK, k, None] * row
        return out.reshape(*x.shape[:-1], -1)

    def emit(self, x: Array, suffix: str = "") -> Array:
        """A result of this module: rounded to the dtype, and recorded under the module's name plus
        `suffix`."""
        x = to_dtype(x, self.dtype)
        if self.record is not None:
            self.record[self.name + suffix] = x
        return x

    def _dequantized(self, tensor: StoredTensor, scale: StoredTensor, rows: Any) -> Array:
        """Rows of a quantised weight in float64, exactly. Raises PaliGemmaError if they hold NaN or
        infinity."""
        exact = replace(self, dtype="float64")
        codes, scales = np.array(_map(tensor)[rows]), exact._widen(scale, _map(scale)[rows])
        with np.errstate(invalid="ignore"):  # 0 times infinity
            values = quantized.WEIGHTS[tensor.dtype](codes, scales)
        if not np.isfinite(values).all():
            raise PaliGemmaError(
                f"{tensor.file}: {tensor.name!r} holds NaN or infinity: the checkpoint is damaged"
            )
        return values

    def _widen(self, tensor: StoredTensor, raw: Array) -> Array:
        """Values of a tensor, as `to_dtype` returns them. Raises PaliGemmaError if those of an adapter hold
        NaN or infinity."""
        if raw.dtype == np.uint16:  # bfloat16: the upper half of a float32
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if tensor.adapter and not np.isfinite(raw).all():
            fault = "holds NaN or infinity: the adapter is damaged"
            raise PaliGemmaError(f"{tensor.file}: {tensor.name!r} {fault}")
        return to_dtype(raw, self.dtype)


def _map(tensor: StoredTensor) -> Array:
    """A tensor as it is stored in its file, in the layout of the model; bfloat16 as its 16 bits."""
    dtype = FILES[tensor.dtype]
    shape = tensor.file_shape or tensor.shape
    array = np.memmap(tensor.file, dtype=dtype, mode="r", offset=tensor.offset, shape=shape)
    ordered = array if tensor.permutation is None else array.transpose(tensor.permutation)
    return ordered.reshape(tensor.shape)
