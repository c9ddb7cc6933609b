"""PaliGemma: Beyer et al. 2024, arXiv:2407.07726. Image tokens, then text; the prefix sees itself, the suffix is causal.

Follows google-research/big_vision (models/proj/paligemma/paligemma.py): positions count valid tokens from 0, text
embeddings are scaled by sqrt(E), image embeddings are not, and padding is neither seen nor counted.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from .. import checkpoint
from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError
from . import gemma, siglip
from .layers import linear, softmax
from .params import ARITHMETIC, Array, Params


def make_attn_mask(input_mask: Array, mask_ar: Array) -> Array:  # (B, T) twice -> (B, T, T)
    """Token i sees token j when both are valid and cumsum(mask_ar)[j] <= cumsum(mask_ar)[i].

    With mask_ar 0 for the prefix and 1 for the suffix (P image, p prompt, s suffix, x where the row sees the column):

            P P p s s
          P x x x . .
          P x x x . .
          p x x x . .
          s x x x x .
          s x x x x x
    """
    block = np.cumsum(mask_ar, axis=1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & (input_mask[:, None, :] & input_mask[:, :, None])


def embed_image(pixel_values: Array, p: Params, config: PaliGemmaConfig) -> Array:  # (B, 3, S, S) -> (B, P, E)
    x = siglip.vision_model(pixel_values, p / "vision_tower" / "vision_model", config.vision_config)
    return linear(x, p / "multi_modal_projector" / "linear")


def embed(input_ids: Array, image_embeds: Array | None, p: Params, config: PaliGemmaConfig) -> Array:  # -> (B, T, E)
    """Text rows from the table, `<image>` places from the projected patches, in order."""
    is_image = input_ids == config.image_token_index
    x = gemma.embed_tokens(np.where(is_image, 0, input_ids), p / "language_model" / "model" / "embed_tokens", config.text_config)
    patches = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
    if is_image.sum() != patches:
        raise PaliGemmaError(f"input_ids hold {is_image.sum()} <image> tokens; the images have {patches} patches")
    if image_embeds is not None:
        x[is_image] = image_embeds.reshape(-1, x.shape[-1])
    return (p / "language_model" / "model").emit(x, ".input")


def decode(x: Array, input_mask: Array, mask_ar: Array, p: Params, config: PaliGemmaConfig) -> Array:  # -> (B, T, E)
    positions = np.cumsum(input_mask, axis=1) - 1
    mask = make_attn_mask(input_mask, mask_ar)
    return gemma.model(x, p / "language_model" / "model", positions, mask, config.text_config)


class Reference:
    """A checkpoint, computed in plain NumPy. `dtype`: float64, float32, or bfloat16/float16 (float32 arithmetic with
    every weight and every result of an operation rounded to that format)."""

    def __init__(self, model_dir: str | Path, dtype: str):
        self.config = PaliGemmaConfig.load(model_dir)
        self.params = Params(checkpoint.tensors(model_dir, self.config), dtype)

    def forward(
        self,
        input_ids: Array,
        pixel_values: Array | None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        record: dict[str, Array] | None = None,
    ) -> Array:
        """Logits (B, T, V) at every position; those of padding mean nothing.

        input_ids (B, T) with `<image>` once for each patch; pixel_values (B, 3, S, S); attention_mask (B, T), 0 for
        padding, anywhere; token_type_ids (B, T), 1 for the suffix. `record` receives every intermediate by name."""
        p = replace(self.params, record=record)
        input_ids = np.asarray(input_ids)
        input_mask = np.ones(input_ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
        mask_ar = np.zeros(input_ids.shape, int) if token_type_ids is None else np.asarray(token_type_ids)
        image_embeds = None if pixel_values is None else embed_image(self._cast(pixel_values), p, self.config)
        x = decode(embed(input_ids, image_embeds, p, self.config), input_mask, mask_ar, p, self.config)
        logits = gemma.lm_head(x, p / "language_model" / "model" / "embed_tokens")
        return replace(p, name="logits").emit(logits)

    def generate(
        self,
        input_ids: Array,
        pixel_values: Array | None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        do_sample: bool = False,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
    ) -> Array:
        """New tokens (B, N), each row ended by its end token and then filled with the pad token."""
        input_ids = np.asarray(input_ids)
        B, T = input_ids.shape
        input_mask = np.ones((B, T), bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
        mask_ar = np.zeros((B, T), int) if token_type_ids is None else np.asarray(token_type_ids)
        rows = []
        for b in range(B):  # each row alone and without its padding
            valid, images = input_mask[b], None if pixel_values is None else pixel_values[b : b + 1]
            stream = self.stream(
                input_ids[b : b + 1, valid], images, mask_ar[b : b + 1, valid],
                temperature=temperature if do_sample else 0.0, top_p=top_p, eos_token_id=eos_token_id, seed=seed, row=b,
            )  # fmt: skip
            rows.append(list(islice(stream, max_new_tokens)))
        tokens = np.full((B, max(map(len, rows))), self.config.pad_token_id, np.int64)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        return tokens

    def stream(
        self,
        input_ids: Array,
        pixel_values: Array | None,
        token_type_ids: Array | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        row: int = 0,
    ) -> Iterator[int]:
        """The tokens of one row, one at a time, each from a new pass over everything before it."""
        p, config = self.params, self.config
        ends = config.eos_token_ids if eos_token_id is None else np.atleast_1d(eos_token_id)
        uniform = np.random.default_rng(None if seed is None else [seed, row])
        image_embeds = None if pixel_values is None else embed_image(self._cast(pixel_values), p, config)
        x = embed(np.asarray(input_ids), image_embeds, p, config)
        mask_ar = np.zeros(x.shape[:2], int) if token_type_ids is None else np.asarray(token_type_ids)
        table = p / "language_model" / "model" / "embed_tokens"
        while True:
            last = decode(x, np.ones(x.shape[:2], bool), mask_ar, p, config)[:, -1]
            logits = gemma.lm_head(last, table)[0]
            if not np.isfinite(logits).all():
                raise PaliGemmaError("the logits hold NaN or infinity: the checkpoint is damaged, or float16 overflows (float64 does not)")
            token = sample(logits, temperature, top_p, uniform.random())
            yield token
            if token in ends:
                return
            x = np.concatenate([x, gemma.embed_tokens(np.array([[token]]), table, config.text_config)], axis=1)  # `<image>` too is text here
            mask_ar = np.concatenate([mask_ar, [[1]]], axis=1)

    def _cast(self, pixel_values: Array) -> Array:
        arithmetic, rounded = ARITHMETIC[self.params.dtype]
        return rounded(np.asarray(pixel_values)) if rounded else np.asarray(pixel_values, arithmetic)


def sample(logits: Array, temperature: float, top_p: float, u: float) -> int:  # (V,) -> a token
    """The token at `u` in [0, 1) of the nucleus: Holtzman et al. 2019, arXiv:1904.09751.

    The nucleus is the smallest set of most probable tokens whose probability reaches top_p; of equals, the lower ids.
    Temperature 0 takes the most probable token."""
    if temperature == 0:
        return int(np.argmax(logits))
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature makes all but the best -inf
        probabilities = softmax((logits - logits.max()) / temperature)
    order = np.argsort(-probabilities, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    size = min(int(np.searchsorted(cumulative, top_p, side="left")) + 1, len(order))
    return int(order[np.searchsorted(cumulative[:size], u * cumulative[size - 1], side="right")])


def load(model_dir: str | Path, dtype: type | str = np.float64) -> Reference:
    """The reference of a checkpoint directory, with its weights left in their files.

    dtype: np.float64 (the correct numbers), np.float32, or "bfloat16"/"float16" (see Reference)."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ARITHMETIC:
        raise PaliGemmaError(f"dtype is {name!r}; the reference computes in {', '.join(ARITHMETIC)}")
    return Reference(model_dir, name)
