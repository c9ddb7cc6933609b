"""The weights of the mask decoder: downloads Google's file, and checks its contents. Does not import torch.

The file is the VQ-VAE of Ning et al. 2023, arXiv:2301.02229, as big_vision uses it: an .npz with PyTorch's
names and layouts. It may contain the encoder, which computes codes from masks for training and is not read.
All other arrays must match exactly; their headers are checked before memory is allocated."""

import http.client
import lzma
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from math import prod
from pathlib import Path

import numpy as np

from ..command import tell
from ..errors import PaliGemmaError
from ..files import npy_header

URL = "https://storage.googleapis.com/big_vision/paligemma/vae-oid.npz"
LIMIT = 64 << 20  # bytes; the decoder and its encoder are some 2 million float32 weights
TIMEOUT = 30  # seconds without a byte
EMBEDDING = "_vq_vae._embedding"
UNUSED = ("encoder.", "_vq_vae.")  # prefixes of the names of parameters for training
CODES, WIDEST = 128, 4096  # rows of the codebook; a bound that is above its columns
BROKEN = (  # what damaged files raise
    OSError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


def expected_shapes(E: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the decoder, in the order of the data flow. Convolutions are
    (out, in, k, k), transposed convolutions (in, out, k, k). E: the width of the codebook."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (CODES, E)}

    def layer(name: str, out: int, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (out,)

    layer("decoder.0", 128, 128, E, 1, 1)
    for block in ("decoder.2.net", "decoder.3.net"):
        layer(f"{block}.0", 128, 128, 128, 3, 3)
        layer(f"{block}.2", 128, 128, 128, 3, 3)
        layer(f"{block}.4", 128, 128, 128, 1, 1)
    for n, size_in, size_out in ((4, 128, 128), (6, 128, 64), (8, 64, 32), (10, 32, 16)):
        layer(f"decoder.{n}", size_out, size_in, size_out, 4, 4)
    layer("decoder.12", 1, 1, 16, 1, 1)
    return shapes


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The decoder's parameters by name, float32. Raises PaliGemmaError for a file that is not exactly this
    decoder."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise ValueError("it has two arrays of one name")
            used = [name for name in members if name == EMBEDDING or not name.startswith(UNUSED)]
            shapes = {name: _shape(archive, members[name]) for name in used}
            _check(shapes)
            return {name: _array(archive, members[name]) for name in expected_shapes(shapes[EMBEDDING][1])}
    except FileNotFoundError:
        raise PaliGemmaError(f"{path}: there is no such file; the mask decoder is at {URL}") from None
    except BROKEN as error:
        raise PaliGemmaError(f"{path} is not the mask decoder, vae-oid.npz: {error}") from None


def _shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape of an array. Raises ValueError if its bytes are not that many floating-point numbers."""
    with archive.open(info) as file:
        shape, _, dtype = npy_header(file)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ValueError(f"{info.filename} holds {dtype}, not floating-point numbers")
        size = file.tell() + prod(shape) * dtype.itemsize
        if info.file_size != size:
            raise ValueError(f"{info.filename} has {info.file_size} bytes; {dtype} {shape} takes {size}")
        return shape


def _check(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the names and the shapes are those of the decoder."""
    if EMBEDDING not in shapes:
        raise ValueError(f"it has no {EMBEDDING}")
    shape = shapes[EMBEDDING]
    if len(shape) != 2 or not 1 <= shape[1] <= WIDEST:
        raise ValueError(f"{EMBEDDING} has shape {shape}; it must be ({CODES}, E)")
    expected = expected_shapes(shape[1])
    missing, unexpected = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{len(names)} arrays are {problem} ({some})")
    for name, wanted in expected.items():
        if shapes[name] != wanted:
            raise ValueError(f"{name} has shape {shapes[name]}; it must be {wanted}")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:  # at the end of the file zipfile compares the checksum
        array = np.ascontiguousarray(np.lib.format.read_array(file, allow_pickle=False), np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{info.filename} holds NaN or infinity")
    return array


def find(path: str | Path | None = None, *, local_files_only: bool = False) -> Path:
    """The file: `path` if it is given, else the one in the cache of Hugging Face's hub, to which the first
    call downloads it.

    Raises PaliGemmaError, with the remedy, if it cannot be downloaded."""
    if path is not None:
        return Path(path)
    from huggingface_hub import cached_assets_path, constants

    remedy = f"download {URL} and give it with --mask-decoder"
    try:
        file = cached_assets_path("paligemma", "mask_decoder") / "vae-oid.npz"
        if not file.exists():
            if local_files_only or constants.HF_HUB_OFFLINE:
                problem = f"is not in the cache {file.parent} and downloads are switched off"
                raise PaliGemmaError(f"the mask decoder {problem}: {remedy}")
            tell(f"fetching the mask decoder from {URL}")
            _fetch(file)
    except PaliGemmaError:
        raise
    except urllib.error.HTTPError as error:
        problem = f"cannot be fetched, {URL} answers {error.code}"
        raise PaliGemmaError(f"the mask decoder {problem}: {remedy}") from None
    except (http.client.HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise PaliGemmaError(f"the mask decoder cannot be fetched from {URL} ({reason}): {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a file where the cache's directory should be
        problem = f"cannot be kept in {constants.HF_ASSETS_CACHE} ({error})"
        raise PaliGemmaError(f"the mask decoder {problem}: set HF_HOME, or {remedy}") from None
    return file


def _fetch(file: Path) -> None:
    """Download URL to `file`, completely or not at all."""
    remedy = "give the file with --mask-decoder"
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer, open(partial, "wb") as out:
            while chunk := answer.read(1 << 16):
                out.write(chunk)
                if out.tell() > LIMIT:
                    problem = f"sends more than {LIMIT >> 20} MB, which is not the mask decoder"
                    raise PaliGemmaError(f"{URL} {problem}: {remedy}")
        try:
            read(partial)
        except PaliGemmaError as error:
            problem = str(error).removeprefix(f"{partial} ")
            raise PaliGemmaError(f"the file from {URL} {problem}: try again later, or {remedy}") from None
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
