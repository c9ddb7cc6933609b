"""From images and prompts to the arrays that both models eat, and from token ids back to text."""

import io
import math
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import sentencepiece
from PIL import ExifTags, Image, UnidentifiedImageError

from . import outputs
from .config import PaliGemmaConfig, read_json
from .errors import PaliGemmaError
from .tokenizer_json import sentencepiece_model

ImageSource = Image.Image | np.ndarray | str | Path | bytes | BinaryIO

UPRIGHT = {  # EXIF's orientation -> the turn that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Tokenizer:
    """SentencePiece with PaliGemma's ids around it. A prompt is plain text: of what it spells, only pieces that the model
    itself defines, such as `<loc0000>` and `<seg000>`, become special; `<bos>`, `<eos>` and `<image>` do not."""

    def __init__(self, model: bytes, config: PaliGemmaConfig):
        if not model:
            raise RuntimeError("empty")  # which SentencePiece would take for no model at all
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos_token_id, self.pad_token_id, self.eos_token_ids = config.bos_token_id, config.pad_token_id, config.eos_token_ids
        self.image_token_id = config.image_token_index
        if self.pieces.bos_id() != self.bos_token_id:
            raise PaliGemmaError(f"the tokenizer's <bos> is {self.pieces.bos_id()}, config.json's {self.bos_token_id}: they are not of one checkpoint")
        if len(self.pieces) > config.text_config.vocab_size:
            raise PaliGemmaError(f"the tokenizer has {len(self.pieces)} pieces, the model {config.text_config.vocab_size}: they are not of one checkpoint")

    @classmethod
    def load(cls, model_dir: Path, config: PaliGemmaConfig, file: str | Path | None = None) -> "Tokenizer":
        """From tokenizer.model, or rebuilt from tokenizer.json where a checkpoint has only that; or from another such file."""
        path = Path(file) if file is not None else model_dir / "tokenizer.model"
        if file is None and not path.exists():
            path = model_dir / "tokenizer.json"
        if file is None and not path.exists():
            raise PaliGemmaError(f"{model_dir} has no tokenizer.model and no tokenizer.json: give one with --tokenizer (tokenizer=...)")
        try:
            return cls(sentencepiece_model(read_json(path)) if path.suffix == ".json" else path.read_bytes(), config)
        except (OSError, RuntimeError) as error:
            raise PaliGemmaError(f"{path} is not a tokenizer that SentencePiece reads ({error}): download it again") from None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, nothing added."""
        try:
            return self.pieces.encode(text.encode())
        except (AttributeError, UnicodeEncodeError):  # no str, or half of a surrogate pair in it
            raise PaliGemmaError(f"{text!r} is no Unicode text: give the prompt as a str") from None

    def encode_prompt(self, prompt: str) -> list[int]:
        """<bos>, the prompt, and a newline that is tokenised on its own, as in training."""
        return [self.bos_token_id, *self.encode(prompt), *self.encode("\n")]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of token ids (a list, an array or a tensor of one row). With skip_special_tokens, ids that stand for no
        text (<pad>, <bos>, <eos>, <unk>, <image> and the unused rows behind it) are left out; otherwise they are spelled."""
        parts, run = [], []
        for i in map(int, ids.tolist() if hasattr(ids, "tolist") else ids):  # one copy from a device, not one a token
            if not 0 <= i < len(self.pieces):
                special = "<image>" if i == self.image_token_id else f"<{i}>"
            elif self.pieces.is_control(i) or self.pieces.is_unknown(i):
                special = self.pieces.id_to_piece(i)
            else:
                run.append(i)
                continue
            if not skip_special_tokens:
                parts += [self.pieces.decode(run), special]
                run = []
        return "".join(parts) + self.pieces.decode(run)

    def piece(self, i: int) -> str:
        """The name of a token; "" for an id that the tokenizer does not have."""
        return self.pieces.id_to_piece(i) if 0 <= i < len(self.pieces) else ""

    def texts(self, ids: list[int]) -> list[str]:
        """What each id adds to the text: the last byte of a character adds all of it."""
        stream = TextStream(self)
        texts = [stream.push(i) for i in ids]
        return [*texts[:-1], texts[-1] + stream.finish()] if texts else []


class TextStream:
    """Text as its tokens arrive: `push` returns what has become certain. A character whose bytes are spread over several
    tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.shown, self.held = tokenizer, "", []

    @property
    def text(self) -> str:
        """All of it so far, a character that is not whole included."""
        return self.shown + self.tokenizer.decode(self.held)

    def push(self, token: int) -> str:
        self.held.append(token)
        return "" if self.tokenizer.decode(self.held).endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What was held back."""
        new = self.tokenizer.decode(self.held)
        self.shown, self.held = self.shown + new, []
        return new


class Processor:
    """`processor(text=[...], images=[...])` makes the inputs of a model."""

    def __init__(self, tokenizer: Tokenizer, config: PaliGemmaConfig, preprocessor: dict):
        self.tokenizer, self.config = tokenizer, config
        size = config.vision_config.image_size

        def setting(name, default, valid, wanted):
            value = preprocessor.get(name, default)
            if not valid(value):
                raise PaliGemmaError(f"image processor settings: {name} is {value!r}; it must be {wanted}")
            return value

        setting("size", size, lambda v: v in (size, {"height": size, "width": size}), f"the {size} of config.json in height and width")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            setting(name, True, lambda v: v is True, "true, as nothing else is implemented")
        self.resample = Image.Resampling(setting("resample", 3, lambda v: type(v) is int and 0 <= v <= 5, "one of Pillow's filters, 0 to 5 (3 is bicubic)"))
        self.rescale_factor = setting("rescale_factor", 1 / 255, _is_positive, "a positive number")
        mean = setting("image_mean", [0.5] * 3, lambda v: _are_three(v, _is_number), "three numbers")
        std = setting("image_std", [0.5] * 3, lambda v: _are_three(v, _is_positive), "three positive numbers")
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
            raise PaliGemmaError(f"{model_dir / 'processor_config.json'}: image_processor is {preprocessor!r}; it must be an object")
        return cls(Tokenizer.load(model_dir, config, tokenizer), config, preprocessor)

    def __call__(self, text: str | list[str], images: ImageSource | list[ImageSource], suffix: str | list[str] | None = None) -> dict[str, Any]:
        """The inputs of `model.generate` and `model(...)` as torch tensors; see `arrays`."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays(text, images, suffix).items()}

    def arrays(self, text: str | list[str], images: ImageSource | list[ImageSource], suffix: str | list[str] | None = None) -> dict[str, Any]:
        """The inputs of both models in NumPy: input_ids (B, T) and attention_mask (B, T) int64, shorter rows padded on the
        left; pixel_values (B, 3, S, S) float32; and, where a suffix (an answer to score or to continue) is given,
        token_type_ids (B, T) with 1 at its tokens.

        text: a prompt for each image, without `<image>`, `<bos>` or newline, which are added here. images: PIL images,
        (H, W, 3) uint8 arrays, paths, bytes or open files. Raises PaliGemmaError for an image that cannot be read, for
        lists of different lengths, and for a prompt beyond the model's context."""
        prompts = list(text) if isinstance(text, (list, tuple)) else [text]
        sources = list(images) if isinstance(images, (list, tuple)) else [images]
        suffixes = [""] * len(prompts) if suffix is None else list(suffix) if isinstance(suffix, (list, tuple)) else [suffix]
        if not len(prompts) == len(sources) == len(suffixes) or not prompts:
            raise PaliGemmaError(
                f"{len(prompts)} prompts, {len(sources)} images and {len(suffixes)} suffixes: there must be one image (and suffix) for each prompt"
            )

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


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0


def _are_three(values, valid) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(map(valid, values))


def open_image(source: ImageSource) -> Image.Image:
    """An upright RGB image from a PIL image, a uint8 array (H, W, 3) or (H, W), a path, bytes or an open file.

    The first frame of an animation; alpha is dropped; the orientation that a camera recorded is applied. Raises
    PaliGemmaError for what is no image, is cut off, or would unpack to more than Pillow's limit of 179 million pixels."""
    name = str(source) if isinstance(source, (str, Path)) else "the image"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or (source.ndim != 2 and source.shape[2:] != (3,)):
            raise PaliGemmaError(f"the image is an array of {source.dtype} {source.shape}; it must be uint8, (height, width, 3) or (height, width)")
    elif not isinstance(source, (Image.Image, str, Path, bytes)) and not hasattr(source, "read"):
        raise PaliGemmaError(f"the image is a {type(source).__name__}; it must be a PIL image, a NumPy array, a path, bytes or an open file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about sizes and metadata: the image is taken or refused
            if isinstance(source, Image.Image):
                return unpack(source)
            if isinstance(source, np.ndarray):
                return unpack(Image.fromarray(source))
            Image.init()
            safe = [name for name in Image.ID if name != "EPS"]  # which Pillow hands to Ghostscript to run
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=safe) as image:
                return unpack(image)
    except FileNotFoundError:
        raise PaliGemmaError(f"{name}: there is no such file") from None
    except Image.DecompressionBombError:
        raise PaliGemmaError(f"{name} is larger than 179 million pixels, which only an attack or a mistake is: scale it down first") from None
    except UnidentifiedImageError:
        raise PaliGemmaError(f"{name} is not in an image format that Pillow reads: convert it to PNG or JPEG") from None
    except (OSError, SyntaxError, TypeError, ValueError, EOFError, RuntimeError, struct.error) as error:  # what Pillow's decoders raise for broken files
        raise PaliGemmaError(f"{name} cannot be read as an image: {error}") from None


def unpack(image: Image.Image) -> Image.Image:
    """The pixels, upright, in RGB. An image that is so already is returned itself: a copy of a photo costs 50 ms."""
    if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, struct.error):  # metadata that cannot be read say nothing
        turn = None
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any of Pillow's modes; grey of more than 8 bits, which Pillow's own conversion clips, is scaled."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    elif image.mode == "La":  # premultiplied alpha, which Pillow takes off on the way to LA only
        image = image.convert("LA")
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
