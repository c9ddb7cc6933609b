"""From images and prompts to the arrays that both models eat, and from token ids back to text."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import sentencepiece
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .config import PaliGemmaConfig, read_json
from .errors import PaliGemmaError
from .tokenizer_json import sentencepiece_model

if TYPE_CHECKING:
    import torch

ImageSource = Image.Image | np.ndarray | str | Path | bytes | BinaryIO


class Tokenizer:
    """SentencePiece with PaliGemma's ids around it. A prompt is plain text: of what it spells, only pieces that the model
    itself defines, such as `<loc0000>` and `<seg000>`, become special; `<bos>`, `<eos>` and `<image>` do not."""

    def __init__(self, model: bytes, config: PaliGemmaConfig):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos_token_id, self.pad_token_id, self.eos_token_ids = config.bos_token_id, config.pad_token_id, config.eos_token_ids
        self.image_token_id = config.image_token_index

    @classmethod
    def load(cls, model_dir: Path, config: PaliGemmaConfig) -> "Tokenizer":
        """From tokenizer.model, or rebuilt from tokenizer.json where a checkpoint has only that."""
        path = model_dir / "tokenizer.model"
        if path.exists():
            model = path.read_bytes()
        elif (model_dir / "tokenizer.json").exists():
            model = sentencepiece_model(read_json(model_dir / "tokenizer.json"))
        else:
            raise PaliGemmaError(f"{model_dir} has no tokenizer.model and no tokenizer.json")
        try:
            return cls(model, config)
        except RuntimeError as error:
            raise PaliGemmaError(f"{path} is not a SentencePiece model ({error}): download it again") from None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, nothing added."""
        return self.pieces.encode(text)

    def encode_prompt(self, prompt: str) -> list[int]:
        """<bos>, the prompt, and a newline that is tokenised on its own, as in training."""
        return [self.bos_token_id, *self.encode(prompt), *self.encode("\n")]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of token ids (a list, an array or a tensor of one row). With skip_special_tokens, ids that stand for no
        text (<pad>, <bos>, <eos>, <image> and the unused rows behind it) are left out; otherwise they are spelled."""
        parts, run = [], []
        for i in (int(i) for i in ids):
            if not 0 <= i < len(self.pieces):
                special = "<image>" if i == self.image_token_id else f"<{i}>"
            elif self.pieces.is_control(i):
                special = self.pieces.id_to_piece(i)
            else:
                run.append(i)
                continue
            if not skip_special_tokens:
                parts += [self.pieces.decode(run), special]
                run = []
        return "".join(parts) + self.pieces.decode(run)


class TextStream:
    """Text as its tokens arrive: `push` returns what has become certain. A character whose bytes are spread over several
    tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    @property
    def text(self) -> str:
        """All of it so far, a character that is not whole included."""
        return self.tokenizer.decode(self.ids)

    def push(self, token: int) -> str:
        self.ids.append(token)
        return "" if self.text.endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What was held back."""
        new = self.text[self.shown :]
        self.shown += len(new)
        return new


class Processor:
    """`processor(text=[...], images=[...])` makes the inputs of a model."""

    def __init__(self, tokenizer: Tokenizer, config: PaliGemmaConfig, preprocessor: dict):
        self.tokenizer, self.config = tokenizer, config
        size = config.vision_config.image_size
        stated = preprocessor.get("size", size)
        if stated not in (size, {"height": size, "width": size}):
            raise PaliGemmaError(f"preprocessor_config.json: size is {stated}; config.json says {size}")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if preprocessor.get(name, True) is not True:
                raise PaliGemmaError(f"preprocessor_config.json: {name} is {preprocessor[name]!r}, which is not implemented (only true)")
        self.resample = Image.Resampling(preprocessor.get("resample", Image.Resampling.BICUBIC))
        self.rescale_factor = preprocessor.get("rescale_factor", 1 / 255)
        self.mean = np.array(preprocessor.get("image_mean", [0.5] * 3), np.float32)[:, None, None]
        self.std = np.array(preprocessor.get("image_std", [0.5] * 3), np.float32)[:, None, None]

    @classmethod
    def load(cls, model_dir: str | Path, config: PaliGemmaConfig | None = None) -> "Processor":
        """From a checkpoint directory. Raises PaliGemmaError for a tokenizer or settings that cannot be used."""
        model_dir = Path(model_dir)
        config = config or PaliGemmaConfig.load(model_dir)
        preprocessor = {}
        if (model_dir / "preprocessor_config.json").exists():
            preprocessor = read_json(model_dir / "preprocessor_config.json")
        elif (model_dir / "processor_config.json").exists():  # transformers 5
            preprocessor = read_json(model_dir / "processor_config.json").get("image_processor", {})
        return cls(Tokenizer.load(model_dir, config), config, preprocessor)

    def __call__(self, text: str | list[str], images: ImageSource | list[ImageSource], suffix: str | list[str] | None = None) -> "dict[str, torch.Tensor]":
        """The inputs of `model.generate` and `model(...)` as torch tensors; see `arrays`."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays(text, images, suffix).items()}

    def arrays(self, text: str | list[str], images: ImageSource | list[ImageSource], suffix: str | list[str] | None = None) -> dict[str, np.ndarray]:
        """The inputs of both models in NumPy: input_ids (B, T) and attention_mask (B, T) int64, shorter rows padded on the
        left; pixel_values (B, 3, S, S) float32; and, where a suffix (an answer to score or to continue) is given,
        token_type_ids (B, T) with 1 at its tokens.

        text: a prompt for each image, without `<image>`, `<bos>` or newline, which are added here. images: PIL images,
        (H, W, 3) uint8 arrays, paths, bytes or open files. Raises PaliGemmaError for an image that cannot be read, for
        lists of different lengths, and for a prompt beyond the model's context."""
        prompts = [text] if isinstance(text, str) else list(text)
        sources = list(images) if isinstance(images, (list, tuple)) else [images]
        suffixes = [""] * len(prompts) if suffix is None else [suffix] if isinstance(suffix, str) else list(suffix)
        if not len(prompts) == len(sources) == len(suffixes) or not prompts:
            raise PaliGemmaError(f"{len(prompts)} prompts, {len(sources)} images and {len(suffixes)} suffixes: there must be one image (and suffix) for each prompt")

        patches, limit = self.config.vision_config.num_patches, self.config.text_config.max_position_embeddings
        rows, suffix_lengths = [], []
        for prompt, answer in zip(prompts, suffixes, strict=True):
            ids, answer_ids = self.tokenizer.encode_prompt(prompt), self.tokenizer.encode(answer)
            if patches + len(ids) + len(answer_ids) > limit:
                raise PaliGemmaError(f"the prompt is {len(ids) + len(answer_ids)} tokens; with {patches} for the image, this model takes at most {limit - patches}")
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

    def pixels(self, image: Image.Image) -> np.ndarray:  # RGB -> (3, S, S) float32 in [-1, 1]
        """Squeezed to the model's square and normalised, bit for bit as Hugging Face's PIL path does it."""
        S = self.config.vision_config.image_size
        values = np.asarray(image.resize((S, S), self.resample)).transpose(2, 0, 1)
        return (((values * self.rescale_factor).astype(np.float32) - self.mean) / self.std).astype(np.float32)


def open_image(source: ImageSource) -> Image.Image:
    """An upright RGB image from a PIL image, an (H, W, 3) or (H, W) array, a path, bytes or an open file.

    The first frame of an animation; alpha is dropped; the orientation that a camera recorded is applied. Raises
    PaliGemmaError for what is no image, is cut off, or would unpack to more than Pillow's limit of 179 million pixels."""
    name = str(source) if isinstance(source, (str, Path)) else "the image"
    try:
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source)
        elif isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise Image.DecompressionBombError
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise PaliGemmaError(f"{name}: there is no such file") from None
    except Image.DecompressionBombError:
        raise PaliGemmaError(f"{name} is larger than 179 million pixels, which only an attack or a mistake is: scale it down first") from None
    except UnidentifiedImageError:
        raise PaliGemmaError(f"{name} is not in an image format that Pillow reads: convert it to PNG or JPEG") from None
    except (OSError, SyntaxError, TypeError, ValueError, EOFError) as error:  # what Pillow's decoders raise for broken files
        raise PaliGemmaError(f"{name} cannot be read as an image: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any of Pillow's modes. Where Pillow's own conversion would clip (more than 8 bits) it is scaled."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        deep = image.mode != "I" or values.max() > 255  # mode I holds 8 bits or, from a PNG, 16
        image = Image.fromarray(np.clip(values >> 8 if deep else values, 0, 255).astype(np.uint8))
    elif image.mode == "LAB":
        image = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    elif image.mode in ("RGBa", "La"):  # premultiplied alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    return image.convert("RGB")
