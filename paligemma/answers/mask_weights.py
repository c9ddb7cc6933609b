"""The weights of the mask decoder: where Google's file comes from, and what must be in it. No torch.

The file is the VQ-VAE of Ning et al. 2023, arXiv:2301.02229, as big_vision uses it: PyTorch's names and
layouts in an .npz. Its encoder, which makes codes from masks for training, may be there and is not read. All
else is strict, and checked in the headers before memory for it is taken."""

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
UNUSED = ("encoder.", "_vq_vae.")  # beginnings of names that are for training
CODES, WIDEST = 128, 4096  # rows of the codebook; more columns than any has
BROKEN = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)  # what broken files raise


def expected_shapes(E: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder, in the order of the data flow: convolutions (out, in, k, k), transposed
    ones (in, out, k, k)."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (CODES, E)}

    def layer(name: str, out: int, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (out,)

    layer("decoder.0", 128, 128, E, 1, 1)
    for block in ("decoder.2.net", "decoder.3.net"):
        layer(f"{block}.0", 128, 128, 128, 3, 3)
        layer(f"{block}.2", 128, 128, 128, 3, 3)
        layer(f"{block}.4", 128, 128, 128, 1, 1)
    for name, size_in, size_out in (
        ("decoder.4", 128, 128),
        ("decoder.6", 128, 64),
        ("decoder.8", 64, 32),
        ("decoder.10", 32, 16),
    ):
        layer(name, size_out, size_in, size_out, 4, 4)
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
            headers = {
                name: _header(archive, info)
                for name, info in members.items()
                if name == EMBEDDING or not name.startswith(UNUSED)
            }
            _check(headers)
            weights = {
                name: _array(archive, members[name]) for name in expected_shapes(headers[EMBEDDING][0][1])
            }
    except FileNotFoundError:
        raise PaliGemmaError(f"{path}: there is no such file; the mask decoder is at {URL}") from None
    except BROKEN as error:
        raise PaliGemmaError(f"{path} is not the mask decoder, vae-oid.npz: {error}") from None
    return weights


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array; they account for all of its bytes."""
    with archive.open(info) as file:
        shape, _, dtype = npy_header(file)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ValueError(f"{info.filename} holds {dtype}, not floating-point numbers")
        if info.file_size != file.tell() + prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{info.filename} has {info.file_size} bytes, which is not what {dtype} {shape} takes"
            )
        return shape, dtype


def _check(headers: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    shape = headers[EMBEDDING][0] if EMBEDDING in headers else ()
    if len(shape) != 2 or not 1 <= shape[1] <= WIDEST:
        raise ValueError(
            f"{EMBEDDING} has shape {shape}; it must be ({CODES}, E)" if shape else f"it has no {EMBEDDING}"
        )
    expected = expected_shapes(shape[1])
    for what, names in (
        ("missing", expected.keys() - headers.keys()),
        ("unexpected", headers.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{len(names)} arrays are {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            )
    for name, wanted in expected.items():
        if headers[name][0] != wanted:
            raise ValueError(f"{name} has shape {headers[name][0]}; it must be {wanted}")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:  # which compares the checksum at its end
        array = np.ascontiguousarray(np.lib.format.read_array(file, allow_pickle=False), np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{info.filename} holds NaN or infinity")
    return array


def find(path: str | Path | None = None, *, local_files_only: bool = False) -> Path:
    """The file: `path` where it is given, else the one in the cache of Hugging Face's hub, where the first
    call puts it.

    Raises PaliGemmaError when it cannot be fetched, with the way around."""
    if path is not None:
        return Path(path)
    from huggingface_hub import cached_assets_path, constants

    remedy = f"download {URL} and give it with --mask-decoder"
    try:
        file = cached_assets_path("paligemma", "mask_decoder") / "vae-oid.npz"
        if not file.exists():
            if local_files_only or constants.HF_HUB_OFFLINE:
                raise PaliGemmaError(
                    f"the mask decoder is not in the cache {file.parent} and downloads are switched off: {remedy}"
                )
            tell(f"fetching the mask decoder from {URL}")
            _fetch(file)
    except PaliGemmaError:
        raise
    except urllib.error.HTTPError as error:
        raise PaliGemmaError(
            f"the mask decoder cannot be fetched, {URL} answers {error.code}: {remedy}"
        ) from None
    except (http.client.HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise PaliGemmaError(f"the mask decoder cannot be fetched from {URL} ({reason}): {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a file where the cache's directory should be
        raise PaliGemmaError(
            f"the mask decoder cannot be kept in {constants.HF_ASSETS_CACHE} ({error}): set HF_HOME, or {remedy}"
        ) from None
    return file


def _fetch(file: Path) -> None:
    """URL to `file`, which is there whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer, open(partial, "wb") as out:
            while chunk := answer.read(1 << 16):
                out.write(chunk)
                if out.tell() > LIMIT:
                    raise PaliGemmaError(
                        f"{URL} sends more than {LIMIT >> 20} MB, which is not the mask decoder: give the file with --mask-decoder"
                    )
        try:
            read(partial)
        except PaliGemmaError as error:
            raise PaliGemmaError(
                f"what {URL} sent {str(error).removeprefix(f'{partial} ')}: try again later, or give the file with --mask-decoder"
            ) from None
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
