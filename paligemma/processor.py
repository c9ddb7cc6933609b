"""Turns images and prompts into the input arrays of both models."""

import os
from collections.abc import Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .answers import parsing
from .config import IMAGE_SETTINGS, PaliGemmaConfig
from .errors import PaliGemmaError
from .fields import Fields, shown
from .files import read_json
from .images import ImageSource, open_image
from .tokenizer import TextStream, Tokenizer, of_adapter

PROCESSOR, PREPROCESSOR = IMAGE_SETTINGS
Images = ImageSource | Sequence[ImageSource | Sequence[ImageSource]]  # for each prompt one, or a list of them


class Processor:
    """`processor(text=[...], images=[...])` returns the inputs of a model."""

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
        mean = f.numbers("image_mean", [0.5] * 3, -1000, 1000)
        std = f.numbers("image_std", [0.5] * 3, 1e-6, 1000)
        self.mean, self.std = (np.array(v, np.float32)[:, None, None] for v in (mean, std))

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        config: PaliGemmaConfig | None = None,
        tokenizer: str | Path | None = None,
        adapter: str | Path | None = None,
    ) -> "Processor":
        """The processor of a checkpoint directory, or of the directory that contains an .npz file.

        tokenizer: a tokenizer file or directory stored elsewhere. adapter: a directory; its tokenizer and
        image settings, if it has them, replace the model's, because the adapter was trained with them. Raises
        PaliGemmaError for a tokenizer or settings that cannot be used."""
        model_dir = Path(model_dir)
        if model_dir.suffix == ".npz" and not os.path.isdir(model_dir):
            model_dir = model_dir.parent
        config = config or PaliGemmaConfig.load(model_dir)
        if adapter is not None and tokenizer is None:
            tokenizer = of_adapter(Path(adapter))
        return cls(Tokenizer.load(model_dir, config, tokenizer), config, image_settings(model_dir, adapter))

    def __call__(
        self,
        text: str | list[str],
        images: Images,
        suffix: str | list[str] | None = None,
    ) -> dict[str, Any]:
        """The inputs of `model.generate` and `model(...)` as torch tensors; see `arrays`."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays(text, images, suffix).items()}

    def arrays(
        self,
        text: str | list[str],
        images: Images,
        suffix: str | list[str] | None = None,
    ) -> dict[str, Any]:
        """The inputs of both models in NumPy: input_ids (B, T) and attention_mask (B, T) int64, with shorter
        rows padded on the left, and pixel_values (I, 3, S, S) float32, the I images of all rows in order, S
        the side of an image in pixels. If a suffix (an answer to score or to continue) is given,
        token_type_ids (B, T) int64 is 1 at its tokens.

        text: the prompts, without `<image>`, `<bos>` or newline, which are added here.
        images: for each prompt anything that `open_image` accepts, or a list of such images, which may be
        empty. The tokens of a prompt's images come one image after the other, before `<bos>`.
        Raises PaliGemmaError for an image that cannot be read, for lists of different lengths, and for
        images and a prompt that exceed the model's context. All lengths are checked before an image is
        opened."""
        prompts, sources = as_list(text), as_list(images)
        suffixes = [""] * len(prompts) if suffix is None else as_list(suffix)
        if not prompts and not sources:
            raise PaliGemmaError("there is no prompt and no image: a batch has at least one of each")
        if len(prompts) != len(sources):
            counts = f"{_count(prompts, 'prompt')} and {_count(sources, 'image')}"
            several = "; several images of one prompt are a list in the list: [[a, b]]"
            raise PaliGemmaError(f"{counts}: there must be one image for each prompt{several}")
        if len(prompts) != len(suffixes):
            counts = f"{_count(prompts, 'prompt')} and {_count(suffixes, 'suffix')}"
            raise PaliGemmaError(f"{counts}: there must be one suffix for each prompt and image")

        own, rows, suffix_lengths = [as_list(source) for source in sources], [], []
        for prompt, answer, pictures in zip(prompts, suffixes, own, strict=True):
            ids, answer_ids = self.tokenizer.encode_prompt(prompt), self.tokenizer.encode(answer)
            patches = self._image_tokens(len(pictures), len(ids) + len(answer_ids))
            rows.append([self.config.image_token_index] * patches + ids + answer_ids)
            suffix_lengths.append(len(answer_ids))

        T = max(map(len, rows))
        input_ids = np.full((len(rows), T), self.tokenizer.pad_token_id, np.int64)
        attention_mask, token_type_ids = np.zeros_like(input_ids), np.zeros_like(input_ids)
        for b, (row, n) in enumerate(zip(rows, suffix_lengths, strict=True)):
            input_ids[b, T - len(row) :] = row
            attention_mask[b, T - len(row) :] = 1
            token_type_ids[b, T - n :] = 1
        pictures, size = list(chain(*own)), self.config.vision_config.image_size
        pixel_values = np.empty((len(pictures), 3, size, size), np.float32)
        for picture, pixels in zip(pictures, pixel_values, strict=True):
            pixels[...] = self.pixels(open_image(picture))
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return arrays if suffix is None else {**arrays, "token_type_ids": token_type_ids}

    def _image_tokens(self, images: int, text: int) -> int:
        """The number of tokens of a prompt's images. Raises PaliGemmaError if they and `text` tokens after
        them exceed the model's positions."""
        patches, most = self.config.vision_config.num_patches, self.config.text_config.max_position_embeddings
        count = images * patches
        if count + text > most and images > 1:
            taken = f"{images} images of {patches} tokens and {text} of text take {count + text} positions"
            fitting = _count(range(max(most - text, 0) // patches), "image")
            raise PaliGemmaError(f"{taken}; this model has {most}: with this text, give at most {fitting}")
        if count + text > most:
            taken = f"with {count} for the image, this model" if images else "this model"
            raise PaliGemmaError(f"the prompt is {text} tokens; {taken} takes at most {most - count}")
        return count

    def text_stream(self) -> TextStream:
        return TextStream(self.tokenizer)

    def parse(
        self,
        ids,
        image_size: tuple[int, int],
        log_probs=None,
        *,
        bins: int = 1024,
        mask_decoder: parsing.DecodeMasks | None = None,
    ) -> parsing.Answer:
        """The objects and the text of one row of new tokens; see `parsing.parse`."""
        return parsing.parse(self.tokenizer, ids, image_size, log_probs, bins=bins, mask_decoder=mask_decoder)

    def pixels(self, image: Image.Image) -> np.ndarray:  # RGB -> (3, S, S) float32 in [-1, 1]
        """The image resized to a square and normalised, bit-identical to Hugging Face's PIL processor."""
        S = self.config.vision_config.image_size
        values = np.asarray(image.resize((S, S), self.resample)).transpose(2, 0, 1)
        return (((values * self.rescale_factor).astype(np.float32) - self.mean) / self.std).astype(np.float32)


def image_settings(model_dir: Path, adapter: str | Path | None = None) -> dict:
    """The image processor settings of an adapter, or else of the model; empty if neither has any."""
    found = None if adapter is None else _settings(Path(adapter))
    return (_settings(model_dir) if found is None else found) or {}


def _settings(directory: Path) -> dict | None:
    """The image processor settings in a directory; None if it has none."""
    settings = None
    if os.path.lexists(directory / PROCESSOR):
        settings = read_json(directory / PROCESSOR).get("image_processor")
    if settings is None and os.path.lexists(directory / PREPROCESSOR):
        settings = read_json(directory / PREPROCESSOR)
    if settings is not None and not isinstance(settings, dict):
        problem = f"image_processor is {shown(settings)}; it must be an object"
        raise PaliGemmaError(f"{directory / PROCESSOR}: {problem}")
    return settings


def as_list(value: Any) -> list:
    """A list of one for a single value."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _count(things: Sized, name: str) -> str:
    plural = name + ("es" if name.endswith("x") else "s")
    return f"{len(things)} {name if len(things) == 1 else plural}"
