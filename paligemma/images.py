"""Opens an image from any source that people use, as upright RGB pixels."""

import io
import math
import os
import re
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import PaliGemmaError

if TYPE_CHECKING:
    import torch

Bytes = bytes | bytearray | memoryview
ImageSource = Union[Image.Image, np.ndarray, "torch.Tensor", str, os.PathLike, Bytes, BinaryIO]
UPRIGHT = {  # EXIF's orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow stores an orientation
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # a filter can raise the warning
DAMAGED = (  # what Pillow's decoders raise for damaged files
    SyntaxError, TypeError, ValueError, EOFError, RuntimeError, ArithmeticError, LookupError, BufferError,
    struct.error, Warning,
)  # fmt: skip
DAMAGED_EXIF = (SyntaxError, struct.error, ValueError, TypeError, LookupError)


def open_image(
    source: ImageSource, *, most_pixels: int | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    """An upright RGB image. The source is a PIL image, an array, a torch tensor, a path, the bytes of a file,
    or an open file. most_pixels: a limit of your own for the pixels of a file, below Pillow's; it is checked
    before the pixels are decoded. formats: the formats of files that are opened, with Pillow's names; those
    that this Pillow lacks are left out.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; their dtype is uint8, bool,
    or floating-point with values from 0 to 1. The first frame of an animation is used, and alpha is dropped.
    The orientation that a camera recorded is applied once: opening the result again changes nothing. Raises
    PaliGemmaError for a source that is not an image, is cut off, or has more pixels than Pillow's limit
    (178,956,970, twice PIL.Image.MAX_IMAGE_PIXELS). Pillow's own warnings, about large images and damaged
    metadata, are left to the caller's filters."""
    name, safe = shown_name(source, "the image"), list(formats or ())
    try:
        if isinstance(source, Image.Image):
            return unpack(source)
        array = _pixel_array(source)
        if array is not None:
            return unpack(Image.fromarray(array))
        if isinstance(source, (bytes, bytearray, memoryview)):
            source = io.BytesIO(bytes(source))
        elif not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
            wanted = "a PIL image, a NumPy array, a torch tensor, a path, bytes or an open file"
            raise PaliGemmaError(f"the image is a {type(source).__name__}; it must be {wanted}")
        Image.init()
        known = [kind for kind in Image.ID if kind != "EPS"]  # Pillow runs Ghostscript on EPS files
        safe = known if formats is None else [kind for kind in formats if kind in known]
        with Image.open(source, formats=safe) as image:  # pyright: ignore[reportArgumentType]  (not a tensor)
            if most_pixels is not None and image.width * image.height > most_pixels:
                size = f"{image.width} x {image.height} pixels, and {most_pixels:,} are the most"
                raise PaliGemmaError(f"{name} has {size}: scale it down")
            return unpack(image)
    except PaliGemmaError:
        raise
    except TOO_LARGE as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) * (1 if isinstance(error, Warning) else 2)
        problem = f"more than {limit:,} pixels, Pillow's limit for a file that could fill the memory"
        remedy = "scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS where you trust the file"
        raise PaliGemmaError(f"{name} has {problem}: {remedy}") from None
    except UnidentifiedImageError:
        if _is_empty(source):
            raise PaliGemmaError(f"{name} is empty: it has 0 bytes") from None
        which = "that Pillow reads" if formats is None else f"that is taken ({', '.join(safe)})"
        raise PaliGemmaError(f"{name} is not in an image format {which}: convert it to PNG or JPEG") from None
    except OSError as error:
        raise unreadable(name, source, error, "an image") from None
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise PaliGemmaError(f"{name} cannot be read as an image: {reason}") from None


def unreadable(name: str, source: Any, error: OSError, kind: str) -> PaliGemmaError:
    """What is wrong with a source, `name` in messages, that cannot be opened or read as `kind`."""
    if isinstance(source, str) and re.match(r"data:|[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
        url, way = ("data URL", "decode it") if source[:5].lower() == "data:" else ("URL", "download it")
        remedy = f"{way}, and give the path or the bytes of the file"
        return PaliGemmaError(f"{name} is a {url}, and only files are read: {remedy}")
    if isinstance(error, FileNotFoundError):
        return PaliGemmaError(f"{name}: there is no such file")
    return PaliGemmaError(f"{name}: it cannot be read as {kind}: {error.strerror or error}")


def shown_name(source: Any, otherwise: str) -> str:
    """The name of an image or a video in messages: its path, shortened to one line of at most 300 characters,
    or `otherwise` if it is not a path."""
    if not isinstance(source, (str, os.PathLike)):
        return otherwise
    path = os.fsdecode(source)
    path = path if path.isprintable() else repr(path)
    return path if len(path) <= 300 else f"{path[:60]}... ({len(path):,} characters)"


def _is_empty(source: Any) -> bool:
    """Whether a file has no bytes."""
    if isinstance(source, (str, os.PathLike)):
        return os.path.isfile(source) and os.path.getsize(source) == 0  # a pipe has no size
    try:
        source.seek(0)
        return not source.read(1)
    except (AttributeError, OSError, ValueError):
        return False


def _on_host(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor in host memory, in a dtype that NumPy has: it has no bfloat16."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _pixel_array(source: Any) -> np.ndarray | None:  # (H, W) or (H, W, C) uint8
    """The pixels of an array or a tensor; None for any other source. Raises PaliGemmaError for a shape, a
    dtype or values that are not an image's.

    An axis of 1, 3 or 4 can be the channels. If only the first axis can, the shape is (C, H, W). If both the
    first and the last can, an array is (H, W, C), and a tensor is refused because it may be either."""
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(source, torch.Tensor)
    if not tensor and not isinstance(source, np.ndarray):
        return None
    described = f"the image is {'a tensor' if tensor else 'an array'} of {source.dtype} {tuple(source.shape)}"
    pixels = np.asarray(_on_host(source) if tensor else source)  # pyright: ignore[reportArgumentType]
    first, last = (pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4) for axis in (0, 2))
    floating, unclear = np.issubdtype(pixels.dtype, np.floating), tensor and first and last
    known_shape = (pixels.ndim == 2 or first or last) and not unclear
    if not known_shape or not (floating or pixels.dtype == np.uint8 or pixels.dtype == np.bool_):
        shapes = "(height, width), (height, width, channels) or (channels, height, width)"
        wanted = f"uint8, bool or floating-point from 0 to 1, and {shapes} with 1, 3 or 4 channels"
        doubt = ", and it is unclear which this is" if unclear else ""
        raise PaliGemmaError(f"{described}; it must be {wanted}{doubt}")
    if 0 in pixels.shape:
        raise PaliGemmaError(f"{described}: it has no pixels")
    if first and not last:
        pixels = pixels.transpose(1, 2, 0)
    if floating:
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            wanted = "floating-point values must be from 0 to 1 (use uint8 for 0 to 255)"
            raise PaliGemmaError(f"{described} with values from {low:g} to {high:g}; {wanted}")
        pixels = np.rint(pixels.astype(np.float32) * 255)
    elif pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    pixels = pixels.astype(np.uint8)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def unpack(image: Image.Image) -> Image.Image:
    """The image, upright and in RGB. An image that is both already is returned without a copy, which takes
    50 ms for a photo. A new image has no orientation in its metadata, because it is upright."""
    if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGED_EXIF:  # the orientation is unknown
        turn = None
    rgb = to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        for name in ORIENTED:
            rgb.info.pop(name, None)
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes in RGB. Grey of more than 8 bits is scaled; Pillow's own conversion
    would clip it."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    elif image.mode == "La":  # Pillow converts premultiplied alpha to LA only
        image = image.convert("LA")
    if "transparency" in image.info:  # dropped, as alpha is; Pillow would warn that RGB cannot store it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits in mode L. Modes I and F do not state the largest value: it is taken as 1 (F
    only), 255 or 65535, the first that no pixel exceeds."""
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"its grey goes from {low:g} to {high:g}, an unknown range; scale it to 0..255")
    sixteen = image.mode.startswith("I;16") or image.format == "PNG"  # Pillow 10 opens 16-bit PNGs in mode I
    if sixteen or high > 255:
        values = values // 256
    elif image.mode == "F" and high <= 1:
        values = values * 255
    return Image.fromarray(np.rint(values).astype(np.uint8))
