"""Writes the files of quantised weights, a tensor at a time. No torch, no NumPy.

The safetensors library writes a file from tensors that are all in memory. Here the headers come first, from
the dtypes and shapes that are known before, and each tensor is written to its place when it is made."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from .quantized import Form, file_name, nbytes
from .stored import CODESIZE, ITEMSIZE

LARGEST = 5_000_000_000  # bytes of a file, as transformers writes them; the hub takes up to ten times that
ALIGNMENT = 64  # bytes; a header is filled with spaces, so that the tensors begin on a line of the cache


class Writer:
    """The files of a directory. `write` takes each of the tensors once, in any order."""

    def __init__(self, directory: Path, format: str, forms: Mapping[str, Form], stack: ExitStack):
        self.forms, self.left = dict(forms), set(forms)
        self.files: list[BinaryIO] = []
        self.places: dict[str, tuple[BinaryIO, int]] = {}
        shards = _shards(self.forms)
        for number, names in enumerate(shards, start=1):
            header, offsets = _header(names, self.forms)
            path = directory / file_name(format, number, len(shards))
            file = stack.enter_context(open(path, "xb"))  # noqa: SIM115  the stack closes it
            self.files.append(file)
            file.write(header)
            self.places |= {name: (file, len(header) + offset) for name, offset in offsets.items()}

    def write(self, name: str, form: Form, data: memoryview) -> None:
        """Write a tensor: its dtype and shape, and its bytes."""
        assert form == self.forms[name], f"{name} is {form}, and the header says {self.forms[name]}"
        assert data.nbytes == nbytes(form)
        self.left.remove(name)
        file, offset = self.places[name]
        file.seek(offset)
        file.write(data)


@contextmanager
def writing(directory: Path, format: str, forms: Mapping[str, Form]) -> Iterator[Writer]:
    """A writer of these tensors; at the end of the block, all must have been written, and are on the disk."""
    with ExitStack() as stack:
        writer = Writer(directory, format, forms, stack)
        yield writer
        assert not writer.left, f"not written: {sorted(writer.left)}"
        for file in writer.files:
            file.flush()
            os.fsync(file.fileno())


def file_bytes(forms: Mapping[str, Form]) -> int:
    """The size of all files together."""
    shards = _shards(dict(forms))
    return sum(map(nbytes, forms.values())) + sum(len(_header(names, dict(forms))[0]) for names in shards)


def _shards(forms: dict[str, Form]) -> list[list[str]]:
    """The names of the tensors in each file: in their order, as many as LARGEST has room for."""
    shards, size = [[]], 0
    for name, form in forms.items():
        size += nbytes(form)
        if size > LARGEST and shards[-1]:
            shards.append([])
            size = nbytes(form)
        shards[-1].append(name)
    return shards


def _header(names: list[str], forms: dict[str, Form]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and the offset of each tensor after it. Dtypes with larger values come first,
    so that each value is aligned; there may be no gaps."""
    sizes = ITEMSIZE | CODESIZE
    offsets, end, entries = {}, 0, {}
    for name in sorted(names, key=lambda name: -sizes[forms[name][0]]):
        dtype, shape = forms[name]
        offsets[name], end = end, end + nbytes(forms[name])
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets
