"""Reads the small files of a checkpoint. An error says what is wrong with the file and what to do."""

import json
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .errors import PaliGemmaError

if TYPE_CHECKING:
    import numpy

# The beginning of the file that a clone without git-lfs has in place of a large one.
POINTER = b"version https://git-lfs"
LARGEST = 1 << 28  # bytes; the largest of these files, tokenizer.json, has 34 million


def read_bytes(path: Path, what: str = "a file") -> bytes:
    """The contents of a small file of a checkpoint, which should be `what`. Raises PaliGemmaError, with the
    remedy, if it is absent, unreadable or something else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            remedy = "move it away and download the file"
            raise PaliGemmaError(f"{path} is a pipe or a device, not {what}: {remedy}")
        if status.st_size > LARGEST:
            sizes = f"{status.st_size / 1e9:.1f} GB, and such a file has less than {LARGEST / 1e9:.1f} GB"
            raise PaliGemmaError(f"{path} has {sizes}: download it again")
        data = path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise unreadable(path, error, what) from None
        other = "it is not the directory of a checkpoint"
        raise PaliGemmaError(f"{path.parent} has no {path.name}: {other}") from None
    except OSError as error:
        raise unreadable(path, error, what) from None
    if data.startswith(POINTER):
        raise unreadable(path, ValueError(), what)
    return data


def read_json(path: Path) -> dict:
    """A JSON object from a file in UTF-8, UTF-16 or UTF-32. Raises PaliGemmaError, with the remedy, if it is
    absent, unreadable or something else."""
    data = read_bytes(path, "JSON")
    try:
        value = json.loads(data)
    except (RecursionError, ValueError) as error:
        raise PaliGemmaError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise PaliGemmaError(f"{path} does not hold a JSON object: download it again")
    return value


def peek(path: Path) -> dict:
    """A JSON object, or an empty one if it cannot be read; a caller that needs it calls `read_json`."""
    try:
        return read_json(path)
    except PaliGemmaError:
        return {}


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, "numpy.dtype"]:
    """The shape of the array of an .npz file that begins at the file's position, whether it is stored column
    by column, and its dtype. Raises ValueError for anything but an array that NumPy wrote."""
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"it has version {version} of NumPy's format")
    try:
        return readers[version](file)
    except (TypeError, SyntaxError) as error:
        raise ValueError(str(error)) from None


def check_entered(path: Path) -> None:
    """Raise PaliGemmaError for a folder that may not be entered."""
    try:
        os.stat(os.path.join(path, "."))
    except PermissionError:
        denied = "may not be entered (permission denied): change its permissions"
        raise PaliGemmaError(f"{path} {denied}") from None
    except (OSError, ValueError):  # it is a file, or does not exist
        pass


def unreadable(file: Path, error: Exception, what: str, remedy: str = "download it again") -> PaliGemmaError:
    """The error for a file that is not `what` it should be: why, and the remedy."""
    if file.is_symlink() and not os.path.exists(file) and not _forbidden(file):
        target = f"{os.readlink(file)}, which does not exist: {remedy}"
        return PaliGemmaError(f"{file} is a link to {target}")
    if _forbidden(file):  # for which safetensors raises FileNotFoundError
        return PaliGemmaError(f"{file} may not be read (permission denied): change its permissions")
    if is_pointer(file):
        pointer = f"it is git's pointer to the file: run 'git lfs pull' in {file.parent}"
        return PaliGemmaError(f"{file} is not {what}: {pointer}")
    if isinstance(error, IsADirectoryError):
        return PaliGemmaError(f"{file} is a directory, not {what}: move it away and download the file")
    reason = getattr(error, "strerror", None) or error
    return PaliGemmaError(f"{file} is not {what} ({reason}): {remedy}")


def _forbidden(file: Path) -> bool:
    """Whether this process lacks the permission to read the file."""
    try:
        file.open("rb").close()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def is_pointer(file: Path) -> bool:
    """Whether the file is the pointer that a clone without git-lfs has in place of a large file."""
    try:
        return os.path.isfile(file) and file.stat().st_size < 1000 and file.read_bytes().startswith(POINTER)
    except OSError:
        return False
