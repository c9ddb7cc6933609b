"""From images and prompts to the arrays that both models eat."""

import io
import math
import os
import re
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from . import outputs
from .config import Fields, PaliGemmaConfig, shown
from .errors import PaliGemmaError
from .folders import read_json
from .tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    import torch

ImageSource = Union[Image.Image, np.ndarray, "torch.Tensor", str, os.PathLike, bytes, bytearray, memoryview, BinaryIO]

UPRIGHT = {  # EXIF's orientation -> the turn that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Processor:
    """`processor(text=[...], images=[...])` makes the inputs of a model."""

    def __init__(self, tokenizer: Tokenizer, config: PaliGemmaConfig, preprocessor: dict):
        self.tokenizer, self.config = tokenizer, config
        f, size = Fields("image processor settings", "", preprocessor), config.vision_config.image_size
        if f.values.get("size", size) not in (size, {"height": size, "width": size}):
            raise f.wrong("size", f.values["size"], f"the {size} of config.json in height and width")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if f.values.get(name, True) is not True:
                raise f.wrong(name, f.values[name], "true, as nothing else is implemented")
        self.resample = Image.Resampling(f.integer("resample", 3, 0, 5))  # Pillow's filters; 3 is bicubic
        self.rescale_factor = f.number("rescale_factor", 1 / 255, 1e-6, 1000)
        mean, std = f.numbers("image_mean", [0.5] * 3, -1000, 1000), f.numbers("image_std", [0.5] * 3, 1e-6, 1000)
        self.mean, self.std = (np.array(v, np.float32)[:, None, None] for v in (mean, std))

    @classmethod
    def load(cls, model_dir: str | Path, config: PaliGemmaConfig | None = None, tokenizer: str | Path | None = None) -> "Processor":
        """From a checkpoint directory, or from that of an .npz file; `tokenizer` is a file elsewhere. Raises PaliGemmaError for a tokenizer
        or settings that cannot be used."""
        model_dir = Path(model_dir)
        if model_dir.suffix == ".npz" and not model_dir.is_dir():
            model_dir = model_dir.parent
        config = config or PaliGemmaConfig.load(model_dir)
        preprocessor = None
        if (model_dir / "processor_config.json").exists():  # transformers 5, which reads this one first
            preprocessor = read_json(model_dir / "processor_config.json").get("image_processor")
        if preprocessor is None and (model_dir / "preprocessor_config.json").exists():
            preprocessor = read_json(model_dir / "preprocessor_config.json")
        preprocessor = {} if preprocessor is None else preprocessor
        if not isinstance(preprocessor, dict):
            raise PaliGemmaError(f"{model_dir / 'processor_config.json'}: image_processor is {shown(preprocessor)}; it must be an object")
        return cls(Tokenizer.load(model_dir, config, tokenizer), config, preprocessor)

    def __call__(self, text: str | list[str], images: ImageSource | list[ImageSource], suffix: str | list[str] | None = None) -> dict[str, Any]:
        """The inputs of `model.generate` and `model(...)` as torch tensors; see `arrays`."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays(text, images, suffix).items()}

    def arrays(self, text: str | list[str], images: ImageSource | list[ImageSource], suffix: str | list[str] | None = None) -> dict[str, Any]:
        """The inputs of both models in NumPy: input_ids (B, T) and attention_mask (B, T) int64, shorter rows padded on the
        left; pixel_values (B, 3, S, S) float32; and, where a suffix (an answer to score or to continue) is given,
        token_type_ids (B, T) with 1 at its tokens.

        text: a prompt for each image, without `<image>`, `<bos>` or newline, which are added here. images: what `open_image` takes.
        Raises PaliGemmaError for an image that cannot be read, for lists of different lengths, and for a prompt beyond the model's context."""
        prompts = list(text) if isinstance(text, (list, tuple)) else [text]
        sources = list(images) if isinstance(images, (list, tuple)) else [images]
        suffixes = [""] * len(prompts) if suffix is None else list(suffix) if isinstance(suffix, (list, tuple)) else [suffix]
        if not prompts and not sources:
            raise PaliGemmaError("there is no prompt and no image: a batch has at least one of each")
        if len(prompts) != len(sources):
            raise PaliGemmaError(f"{_count(prompts, 'prompt')} and {_count(sources, 'image')}: there must be one image for each prompt")
        if len(prompts) != len(suffixes):
            raise PaliGemmaError(f"{_count(prompts, 'prompt')} and {_count(suffixes, 'suffix')}: there must be one suffix for each prompt and image")

        patches, limit = self.config.vision_config.num_patches, self.config.text_config.max_position_embeddings
        rows, suffix_lengths = [], []
        for prompt, answer in zip(prompts, suffixes, strict=True):
            ids, answer_ids = self.tokenizer.encode_prompt(prompt), self.tokenizer.encode(answer)
            if patches + len(ids) + len(answer_ids) > limit:
                raise PaliGemmaError(
                    f"the prompt is {len(ids) + len(answer_ids)} tokens; with {patches} for the image, this model takes at most {limit - patches}"
                )
            rows.append([self.config.image_token_index] * patches + ids + answer_ids)
            suffix_lengths.append(len(answer_ids))

        T = max(map(len, rows))
        input_ids = np.full((len(rows), T), self.tokenizer.pad_token_id, np.int64)
        attention_mask, token_type_ids = np.zeros_like(input_ids), np.zeros_like(input_ids)
        for b, (row, n) in enumerate(zip(rows, suffix_lengths, strict=True)):
            input_ids[b, T - len(row) :] = row
            attention_mask[b, T - len(row) :] = 1
            token_type_ids[b, T - n :] = 1
        arrays = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": np.stack([self.pixels(open_image(source)) for source in sources]),
        }
        return arrays if suffix is None else {**arrays, "token_type_ids": token_type_ids}

    def text_stream(self) -> TextStream:
        return TextStream(self.tokenizer)

    def parse(self, ids, image_size: tuple[int, int], log_probs=None, *, bins: int = 1024, mask_decoder: outputs.MaskDecoder | None = None) -> outputs.Answer:
        """The objects and the text of one row of new tokens, for a picture of (width, height); see `outputs.parse`."""
        return outputs.parse(self.tokenizer, ids, image_size, log_probs, bins=bins, mask_decoder=mask_decoder)

    def pixels(self, image: Image.Image) -> np.ndarray:  # RGB -> (3, S, S) float32 in [-1, 1]
        """Squeezed to the model's square and normalised, bit for bit as Hugging Face's PIL path does it."""
        S = self.config.vision_config.image_size
        values = np.asarray(image.resize((S, S), self.resample)).transpose(2, 0, 1)
        return (((values * self.rescale_factor).astype(np.float32) - self.mean) / self.std).astype(np.float32)


def _count(things: list, name: str) -> str:
    plural = name + ("es" if name.endswith("x") else "s")
    return f"{len(things)} {name if len(things) == 1 else plural}"


def open_image(source: ImageSource) -> Image.Image:
    """An upright RGB image from a PIL image, an array, a torch tensor, a path, the bytes of a file or an open file.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, of uint8, bool, or floating-point from 0 to 1. The first frame
    of an animation is taken, alpha is dropped, and the orientation that a camera recorded is applied, once: opening the result again changes
    nothing. Raises PaliGemmaError for what is not an image, is cut off, or has more pixels than Pillow's limit (178,956,970, twice
    PIL.Image.MAX_IMAGE_PIXELS). Pillow's own warnings, about large images and damaged metadata, are left to the caller's filters."""
    name = _name(source)
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
        safe = [name for name in Image.ID if name != "EPS"]  # which Pillow hands to Ghostscript to run
        with Image.open(source, formats=safe) as image:  # pyright: ignore[reportArgumentType]  a tensor has been turned into an array
            return unpack(image)
    except PaliGemmaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning, where the caller's filters make it an error
        limit = (Image.MAX_IMAGE_PIXELS or 0) * (1 if isinstance(error, Warning) else 2)
        remedy = "scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS where you trust the file"
        raise PaliGemmaError(f"{name} has more than {limit:,} pixels, Pillow's limit for a file that could fill the memory: {remedy}") from None
    except UnidentifiedImageError:
        if _is_empty(source):
            raise PaliGemmaError(f"{name} is empty: it has 0 bytes") from None
        raise PaliGemmaError(f"{name} is not in an image format that Pillow reads: convert it to PNG or JPEG") from None
    except OSError as error:
        if isinstance(source, str) and re.match(r"data:|[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
            kind, way = ("data URL", "decode it") if source[:5].lower() == "data:" else ("URL", "download it")
            raise PaliGemmaError(f"{name} is a {kind}, and only files are read: {way}, and give the path or the bytes of the file") from None
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read as an image: {error.strerror or error}"
        raise PaliGemmaError(f"{name}: {problem}") from None
    except (SyntaxError, TypeError, ValueError, EOFError, RuntimeError, ArithmeticError, LookupError, BufferError, struct.error, Warning) as error:
        reason = " ".join(str(error).split())  # what Pillow's decoders raise for broken files, in one line
        raise PaliGemmaError(f"{name} cannot be read as an image: {reason}") from None


def _name(source: ImageSource) -> str:
    """What messages call the image: its path, in one line that is not long."""
    if not isinstance(source, (str, os.PathLike)):
        return "the image"
    path = os.fsdecode(source)
    path = path if path.isprintable() else repr(path)
    return path if len(path) <= 300 else f"{path[:60]}... ({len(path):,} characters)"


def _is_empty(source: Any) -> bool:
    """Whether a file that is not an image has no bytes at all."""
    if isinstance(source, (str, os.PathLike)):
        return os.path.isfile(source) and os.path.getsize(source) == 0  # a pipe has no size
    try:
        source.seek(0)
        return not source.read(1)
    except (AttributeError, OSError, ValueError):
        return False


def _on_host(tensor: "torch.Tensor") -> "torch.Tensor":
    """As NumPy can have it, which knows no bfloat16."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _pixel_array(source: Any) -> np.ndarray | None:  # (H, W) or (H, W, C) uint8
    """The pixels of an array or a tensor; None for anything else. Raises PaliGemmaError for shapes and values that could mean several images.

    (C, H, W) is taken where the last axis is not one of channels; of arrays, where the last is one, it is; of tensors it is unclear then."""
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(source, torch.Tensor)
    if not tensor and not isinstance(source, np.ndarray):
        return None
    described = f"the image is {'a tensor' if tensor else 'an array'} of {source.dtype} {tuple(source.shape)}"
    pixels = np.asarray(_on_host(source) if tensor else source)  # pyright: ignore[reportArgumentType]  isinstance of a module that may be absent
    first, last = (pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4) for axis in (0, 2))
    floating, unclear = np.issubdtype(pixels.dtype, np.floating), tensor and first and last
    if unclear or not (pixels.ndim == 2 or first or last) or not (floating or pixels.dtype == np.uint8 or pixels.dtype == np.bool_):
        wanted = "uint8, bool or floating-point from 0 to 1, and (height, width), (height, width, channels) or (channels, height, width)"
        raise PaliGemmaError(f"{described}; it must be {wanted} with 1, 3 or 4 channels" + (", and it is unclear which this is" if unclear else ""))
    if 0 in pixels.shape:
        raise PaliGemmaError(f"{described}: it has no pixels")
    if first and not last:
        pixels = pixels.transpose(1, 2, 0)
    if floating:
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise PaliGemmaError(f"{described} with values from {low:g} to {high:g}; floating-point values must be from 0 to 1 (from 0 to 255, uint8)")
        pixels = np.rint(pixels.astype(np.float32) * 255)
    elif pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    pixels = pixels.astype(np.uint8)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # what Pillow keeps an image's orientation in


def unpack(image: Image.Image) -> Image.Image:
    """The pixels, upright, in RGB. An image that is so already is returned itself: a copy of a photo costs 50 ms. Another one does not say how
    the original was oriented, as it is upright now."""
    if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, struct.error, ValueError, TypeError, LookupError):  # metadata that cannot be read says nothing
        turn = None
    rgb = to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        for name in ORIENTED:
            rgb.info.pop(name, None)
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any of Pillow's modes; grey of more than 8 bits, which Pillow's own conversion clips, is scaled."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    elif image.mode == "La":  # premultiplied alpha, which Pillow takes off on the way to LA only
        image = image.convert("LA")
    if "transparency" in image.info:  # which is dropped as alpha is; Pillow would warn that RGB cannot keep all of it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Mode L from deep grey. Modes I and F do not say how deep: to 1 (F only), 255 or 65535, the first that holds every value."""
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"its grey goes from {low:g} to {high:g}, which is no depth in use; scale it to 0..255")
    if image.mode.startswith("I;16") or image.format == "PNG" or high > 255:  # Pillow 10 opens PNGs of 16 bits in mode I
        values = values // 256
    elif image.mode == "F" and high <= 1:
        values = values * 255
    return Image.fromarray(np.rint(values).astype(np.uint8))
