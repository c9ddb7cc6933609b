"""The small files of a checkpoint: read, or told what is wrong with them and what to do."""

import json
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .errors import PaliGemmaError

if TYPE_CHECKING:
    import numpy

POINTER = (
    b"version https://git-lfs"  # how the file begins that a clone without git-lfs has in place of a large one
)
LARGEST = 1 << 28  # bytes: a tokenizer.json, the largest of these files, has 34 million


def read_bytes(path: Path, what: str = "a file") -> bytes:
    """The contents of a small file of a checkpoint. Raises PaliGemmaError, with the remedy, when it is absent
    or unreadable or is not `what` it should be."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise PaliGemmaError(
                f"{path} is a pipe or a device, not {what}: move it away and download the file"
            )
        if about.st_size > LARGEST:
            raise PaliGemmaError(
                f"{path} has {about.st_size / 1e9:.1f} GB, and such a file has less than {LARGEST / 1e9:.1f}: download it again"
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise unreadable(path, error, what) from None
        raise PaliGemmaError(
            f"{path.parent} has no {path.name}: it is not the directory of a checkpoint"
        ) from None
    except OSError as error:
        raise unreadable(path, error, what) from None
    if data.startswith(POINTER):
        raise unreadable(path, ValueError(), what)
    return data


def read_json(path: Path) -> dict:
    """A JSON object from a file in UTF-8, UTF-16 or UTF-32. Raises PaliGemmaError, with the remedy, when it
    is absent, unreadable or something else."""
    data = read_bytes(path, "JSON")
    try:
        value = json.loads(data)
    except (RecursionError, ValueError) as error:
        raise PaliGemmaError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise PaliGemmaError(f"{path} does not hold a JSON object: download it again")
    return value


def peek(path: Path) -> dict:
    """A JSON object, or an empty one where there is none: whoever needs it reads it again and says what is
    wrong."""
    try:
        return read_json(path)
    except PaliGemmaError:
        return {}


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, "numpy.dtype"]:
    """Shape, whether it is stored column by column, and dtype of the array that begins here, one of an .npz
    file. Raises ValueError for anything but an array that NumPy wrote."""
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
        raise PaliGemmaError(
            f"{path} may not be entered (permission denied): change its permissions"
        ) from None
    except (OSError, ValueError):  # it is a file, or nothing
        pass


def unreadable(file: Path, error: Exception, what: str) -> PaliGemmaError:
    """Why a file is not `what` it should be, with the remedy."""
    if file.is_symlink() and not os.path.exists(file) and not _forbidden(file):
        return PaliGemmaError(
            f"{file} is a link to {os.readlink(file)}, which is not there: download it again"
        )
    if _forbidden(file):  # safetensors says that there is no such file
        return PaliGemmaError(f"{file} may not be read (permission denied): change its permissions")
    if is_pointer(file):
        return PaliGemmaError(
            f"{file} is not {what}: it is git's pointer to the file: run 'git lfs pull' in {file.parent}"
        )
    if isinstance(error, IsADirectoryError):
        return PaliGemmaError(f"{file} is a directory, not {what}: move it away and download the file")
    return PaliGemmaError(
        f"{file} is not {what} ({getattr(error, 'strerror', None) or error}): download it again"
    )


def _forbidden(file: Path) -> bool:
    try:
        file.open("rb").close()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def is_pointer(file: Path) -> bool:
    """Whether the file is what a clone without git-lfs has in place of it."""
    try:
        return os.path.isfile(file) and file.stat().st_size < 1000 and file.read_bytes().startswith(POINTER)
    except OSError:
        return False
