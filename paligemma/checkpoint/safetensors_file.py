"""Finds the safetensors files of a checkpoint directory and reads their headers. No torch."""

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import PaliGemmaError
from ..files import read_json, unreadable
from . import folders
from .stored import ITEMSIZE, StoredTensor

CHUNK = 1 << 24  # bytes; tensors are compared in parts of this size, as float64


def stored_tensors(model_dir: Path) -> list[StoredTensor]:
    """Every tensor in the directory's safetensors files, checked against the index. Without an index, the
    shards must be complete according to their names. Raises PaliGemmaError for missing files or tensors."""
    single, index_path = model_dir / folders.SINGLE, model_dir / folders.INDEX
    if os.path.lexists(single):
        return read_header(single)
    if not os.path.lexists(index_path):
        names, count = folders.shards(file.name for file in model_dir.glob("*.safetensors"))
        if not count or len(names) != count:
            raise folders.without_weights(model_dir)
        return [tensor for name in names for tensor in read_header(model_dir / name)]
    index = read_json(index_path)
    files = [model_dir / name for name in weight_file_names(index)]
    for file in files:
        if not os.path.lexists(file):
            raise PaliGemmaError(
                f"{model_dir} lacks the shard {file.name} that its index names: download it again"
            )
    stored = [tensor for file in files for tensor in read_header(file)]
    lacking = index["weight_map"].items() - {(tensor.name, tensor.file.name) for tensor in stored}
    for name, file in sorted(lacking):
        raise PaliGemmaError(f"{file} does not hold tensor {name!r}, which {index_path.name} says it does")
    return list(_once(stored).values())


def _once(stored: list[StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by name, without duplicates that have equal values.

    Raises PaliGemmaError if two files hold different values for one name: transformers uses the last file,
    whatever the index says, so that the intended value is unclear."""
    once: dict[str, StoredTensor] = {}
    for tensor in stored:
        other = once.setdefault(tensor.name, tensor)
        comparable = other.dtype == tensor.dtype and other.dtype in ITEMSIZE
        if other is not tensor and not (comparable and same_values(other, tensor)):
            both = f"{other.file} and {tensor.file.name} both hold tensor {tensor.name!r}"
            raise PaliGemmaError(f"{both}, with different values: download them again")
    return once


def weight_file_names(index: dict) -> list[str]:
    """The shards that a model.safetensors.index.json names. Raises PaliGemmaError for a name that is not a
    plain file name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PaliGemmaError(f"{folders.INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            wanted = "a plain name that ends in .safetensors"
            raise PaliGemmaError(f"{folders.INDEX} names the file {name!r}, which is not {wanted}")
    return names


def read_header(file: Path, remedy: str = "download it again") -> list[StoredTensor]:
    """Every tensor in a safetensors file, of any dtype. Raises PaliGemmaError, with the remedy, for an
    incomplete or unreadable file."""
    try:
        # safe_open validates the header: sizes, order, no gap, no overlap, whole file.
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error, "a whole safetensors file", remedy) from None
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return [
        StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors in safetensors files hold the same numbers, even in different dtypes."""
    if a.shape != b.shape:
        return False
    count, step = a.nbytes // ITEMSIZE[a.dtype], max(1, CHUNK // 8)
    with open(a.file, "rb") as fa, open(b.file, "rb") as fb:
        fa.seek(a.offset)
        fb.seek(b.offset)
        for start in range(0, count, step):
            size = min(step, count - start)
            left, right = fa.read(size * ITEMSIZE[a.dtype]), fb.read(size * ITEMSIZE[b.dtype])
            equal = left == right if a.dtype == b.dtype else _equal(left, a.dtype, right, b.dtype)
            if not equal:
                return False
    return True


def _equal(left: bytes, left_dtype: str, right: bytes, right_dtype: str) -> bool:
    import numpy as np

    def wide(data: bytes, dtype: str) -> np.ndarray:  # float64, which holds every value of the four dtypes
        if dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)

    return np.array_equal(wide(left, left_dtype), wide(right, right_dtype))
