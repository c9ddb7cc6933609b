"""The reference's view of a checkpoint: parameters by name, widened when they are asked for; results by the
same names.

Weights stay in the file. `p["weight"]` maps one tensor, widens it and lets the map go, so that a 3B
checkpoint runs in a few gigabytes. Formulas end in `return p.emit(x)`: that is where a result gets its name
for `record`, and where it is rounded when the reference is asked to carry out the same formulas in a narrower
dtype (what the rounding costs is the measure by which another implementation in that dtype is judged)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoint.stored import StoredTensor
from ..errors import PaliGemmaError

Array = np.ndarray


def round_bfloat16(x: Array) -> Array:
    """x to the nearest bfloat16, ties to even, still held as float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32)).reshape(np.shape(x))


def round_float16(x: Array) -> Array:
    """x to the nearest float16, still held as float32."""
    return np.asarray(x, dtype=np.float16).astype(np.float32)


# dtype -> (the dtype that arithmetic is done in, what each result and weight is rounded to)
ARITHMETIC: dict[str, tuple[type, Callable[[Array], Array] | None]] = {
    "float64": (np.float64, None),
    "float32": (np.float32, None),
    "bfloat16": (np.float32, round_bfloat16),
    "float16": (np.float32, round_float16),
}


def to_dtype(x: Array, dtype: str) -> Array:
    """x in the arithmetic of `dtype` (a key of ARITHMETIC), rounded to it."""
    arithmetic, rounded = ARITHMETIC[dtype]
    return np.asarray(rounded(x) if rounded else x, dtype=arithmetic)


@dataclass(frozen=True)
class Params:
    """The parameters below one dotted name. `p / "mlp"` goes down a level, `p["weight"]` reads a tensor."""

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
        """The rows of this module's weight."""
        return self.stored[f"{self.name}.weight"].shape[0]

    def rows(self, leaf: str, rows: Any) -> Array:
        """Some rows of a tensor, by any index of NumPy's, without widening the others."""
        tensor = self.stored[f"{self.name}.{leaf}"]
        if tensor.update is None:
            return self._widen(tensor, _map(tensor)[rows])
        exact, down, up = (
            replace(self, dtype="float64"),
            tensor.update.down,
            tensor.update.up,
        )  # what an adapter changes is rounded once, after the change
        change = exact._widen(up, _map(up)[rows]) @ exact._widen(down, _map(down))
        return to_dtype(exact._widen(tensor, _map(tensor)[rows]) + tensor.update.scale * change, self.dtype)

    def blocks(self, leaf: str, size: int = 16384) -> Iterator[Array]:
        """A tensor `size` rows at a time, for one that is large beside the memory it may take."""
        for start in range(0, self.stored[f"{self.name}.{leaf}"].shape[0], size):
            yield self.rows(leaf, slice(start, start + size))

    def emit(self, x: Array, suffix: str = "") -> Array:
        """A result of this module: rounded to the dtype, and recorded under the module's name (plus
        `suffix`)."""
        x = to_dtype(x, self.dtype)
        if self.record is not None:
            self.record[self.name + suffix] = x
        return x

    def _widen(self, tensor: StoredTensor, raw: Array) -> Array:
        """Some values of a tensor in the arithmetic of the dtype. Raises PaliGemmaError for one of an
        adapter's that is damaged."""
        if raw.dtype == np.uint16:  # bfloat16: the upper half of a float32
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if tensor.adapter and not np.isfinite(raw).all():
            raise PaliGemmaError(
                f"{tensor.file}: {tensor.name!r} holds NaN or infinity: the adapter is damaged"
            )
        return to_dtype(raw, self.dtype)


def _map(tensor: StoredTensor) -> Array:
    dtype = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.dtype]
    array = np.memmap(
        tensor.file, dtype=dtype, mode="r", offset=tensor.offset, shape=tensor.file_shape or tensor.shape
    )
    return (array if tensor.permutation is None else array.transpose(tensor.permutation)).reshape(
        tensor.shape
    )
