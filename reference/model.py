"""PaliGemma (Beyer et al. 2024, arXiv:2407.07726) and PaliGemma 2 (arXiv:2412.03555): image tokens, then
text. All tokens of the prefix see one another; the suffix is causal.

Follows google-research/big_vision (models/proj/paligemma/paligemma.py): positions count valid tokens from 0;
text embeddings are scaled by sqrt(E), image embeddings are not; padding is neither seen nor counted."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from .. import checkpoint
from ..checkpoint.stored import HEAD
from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError
from ..options import Sampling, check_log_probs, end_tokens, token_count
from . import gemma, siglip
from .layers import linear, log_softmax, softmax
from .params import ARITHMETIC, Array, Params


def make_attn_mask(input_mask: Array, mask_ar: Array) -> Array:  # (B, T) twice -> (B, T, T)
    """Token i sees token j if both are valid and cumsum(mask_ar)[j] <= cumsum(mask_ar)[i].

    With mask_ar 0 for the prefix and 1 for the suffix (P image, p prompt, s suffix; x where the token of the
    row sees the token of the column):

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


def embed_image(pixel_values: Array, p: Params, config: PaliGemmaConfig) -> Array:
    """The projected patches of images: (I, 3, S, S) -> (I, P, E)."""
    x = siglip.vision_model(pixel_values, p / "vision_tower" / "vision_model", config.vision_config)
    return linear(x, p / "multi_modal_projector" / "linear")


def images_of_rows(input_ids: Array, input_mask: Array, images: int, config: PaliGemmaConfig) -> Array:
    """The number (B,) of images of each row: as many as it has `<image>` tokens for. Raises PaliGemmaError
    unless the rows have the tokens of exactly `images` images."""
    is_image = (input_ids == config.image_token_index) & input_mask
    counts, patches = is_image.sum(axis=1), config.vision_config.num_patches
    if (counts % patches).any() or counts.sum() != images * patches:
        held = f"the rows of input_ids hold {counts.tolist()} <image> tokens, for {images} images"
        raise PaliGemmaError(f"{held}; each image has {patches}")
    return counts // patches


def embed(
    input_ids: Array, input_mask: Array, image_embeds: Array | None, p: Params, config: PaliGemmaConfig
) -> Array:
    """(B, T, E): the embeddings of text from the table, and at `<image>` tokens the projected patches of the
    images (I, P, E), in order: those of the first row, then those of the next."""
    images_of_rows(input_ids, input_mask, 0 if image_embeds is None else len(image_embeds), config)
    is_image = (input_ids == config.image_token_index) & input_mask
    ids = np.where(is_image | ~input_mask, 0, input_ids)
    table = p / "language_model" / "model" / "embed_tokens"
    least, largest = ids.min(), ids.max()
    if least < 0 or largest >= len(table):
        raise PaliGemmaError(f"input_ids go from {least} to {largest}; token ids are 0 to {len(table) - 1}")
    x = gemma.embed_tokens(ids, table, config.text_config).copy()  # the recorded result keeps its values
    if image_embeds is not None:
        x[is_image] = image_embeds.reshape(-1, x.shape[-1])
    return (p / "language_model" / "model").emit(x, ".input")


def hidden_states(x: Array, input_mask: Array, mask_ar: Array, p: Params, config: PaliGemmaConfig) -> Array:
    """The decoder's output for embeddings x: (B, T, E) -> (B, T, E)."""
    positions = np.cumsum(input_mask, axis=1) - 1
    mask = make_attn_mask(input_mask, mask_ar)
    return gemma.model(x, p / "language_model" / "model", positions, mask, mask_ar, config.text_config)


def output_head(p: Params) -> Params:
    """The output head: the checkpoint's weight for it if there is one, else the embedding."""
    own = HEAD in p.stored
    return p / "language_model" / "lm_head" if own else p / "language_model" / "model" / "embed_tokens"


class Reference:
    """A checkpoint's model, computed in plain NumPy. Its dtype is float64, float32, bfloat16 or float16; the
    last two are float32 arithmetic in which each weight, and the result of each operation, is rounded to that
    format."""

    def __init__(self, config: PaliGemmaConfig, params: Params):
        self.config, self.params = config, params

    def forward(
        self, input_ids: Array, pixel_values: Array | None = None,
        attention_mask: Array | None = None, token_type_ids: Array | None = None,
        record: dict[str, Array] | None = None,
    ) -> Array:  # fmt: skip
        """Logits (B, T, V) at every position; those at padding mean nothing.

        input_ids (B, T) hold `<image>` once for each patch; pixel_values (I, 3, S, S) are the images of all
        rows, in order; attention_mask (B, T) is 0 at padding, which may be anywhere; token_type_ids (B, T)
        are 1 for the suffix. `record` receives every intermediate result by name. Raises PaliGemmaError for
        inputs that do not fit together."""
        p = replace(self.params, record=record)
        input_ids, input_mask, mask_ar = self._rows(input_ids, attention_mask, token_type_ids)
        x = embed(input_ids, input_mask, self._embed_image(pixel_values, p), p, self.config)
        x = hidden_states(x, input_mask, mask_ar, p, self.config)
        return gemma.lm_head(x, output_head(p), self.config.text_config)

    def generate(
        self, input_ids: Array, pixel_values: Array | None = None,
        attention_mask: Array | None = None, token_type_ids: Array | None = None, *,
        max_new_tokens: int = 100, temperature: float | None = None, top_p: float = 1.0,
        do_sample: bool | None = None, eos_token_id: int | list[int] | None = None,
        seed: int | None = None, log_probs: list[Array] | None = None,
    ) -> Array:  # fmt: skip
        """New tokens (B, N). Each row ends with its own end token, and is then filled with the pad token.

        Greedy, unless a temperature above 0, a top_p below 1 or do_sample=True is given; with do_sample=False
        it is greedy whatever else is given. A list given as `log_probs` receives the log-probabilities of the
        tokens, (B,) for each column, and 0 at such padding; see `stream`."""
        sampling = Sampling.asked(do_sample, temperature, top_p, seed)
        max_new_tokens = token_count(max_new_tokens)
        check_log_probs(log_probs)
        input_ids, input_mask, mask_ar = self._rows(input_ids, attention_mask, token_type_ids)
        rows, own = [], [[] for _ in input_ids]
        pixel_values = self._pixels(pixel_values)
        counts = images_of_rows(input_ids, input_mask, len(pixel_values), self.config)
        images = np.split(pixel_values, np.cumsum(counts)[:-1])
        for b in range(len(input_ids)):  # each row alone
            stream = self.stream(
                input_ids[b : b + 1], images[b], input_mask[b : b + 1], mask_ar[b : b + 1],
                max_new_tokens=max_new_tokens, temperature=sampling.temperature, top_p=top_p,
                eos_token_id=eos_token_id, seed=seed, row=b, log_probs=own[b],
            )  # fmt: skip
            rows.append(list(stream))
        tokens = np.full((len(rows), max(map(len, rows))), self.config.pad_token_id, np.int64)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        if log_probs is not None:
            log_probs += map(np.array, zip_longest(*own, fillvalue=0.0))
        return tokens

    def stream(
        self, input_ids: Array, pixel_values: Array | None = None,
        attention_mask: Array | None = None, token_type_ids: Array | None = None, *,
        max_new_tokens: int = 100, temperature: float = 0.0, top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None, row: int = 0, log_probs: list[float] | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """The tokens of one row (B = 1), each computed by a new pass over all tokens before it, without
        padding. The random numbers depend on `row`, its index in a batch. A list given as `log_probs`
        receives, before each token, the logarithm of its probability: the softmax of the model's own logits,
        whatever temperature and top_p."""
        sampling, max_new_tokens = Sampling(temperature, top_p, seed), token_count(max_new_tokens)
        check_log_probs(log_probs)
        input_ids, valid, mask_ar = self._rows(input_ids, attention_mask, token_type_ids)
        input_ids, mask_ar = input_ids[valid][None], mask_ar[valid][None]
        p, config = self.params, self.config
        config.text_config.check_positions(input_ids.shape[1] + max_new_tokens - 1)
        uniform = np.random.default_rng(None if seed is None else [seed, row])
        table = p / "language_model" / "model" / "embed_tokens"
        ends = config.eos_token_ids if eos_token_id is None else end_tokens(eos_token_id, len(table))
        x = embed(input_ids, np.ones_like(input_ids, bool), self._embed_image(pixel_values, p), p, config)
        for _ in range(max_new_tokens):
            last = hidden_states(x, np.ones(x.shape[:2], bool), mask_ar, p, config)[:, -1]
            logits = gemma.lm_head(last, output_head(p), config.text_config)[0]
            if not np.isfinite(logits).all():
                cause = "the checkpoint is damaged, or float16 overflows (float64 does not)"
                raise PaliGemmaError(f"the logits hold NaN or infinity: {cause}")
            token = sample(logits, sampling.temperature, sampling.top_p, uniform.random())
            if log_probs is not None:
                log_probs.append(log_softmax(logits.astype(np.float64))[token])
            yield token
            if token in ends:
                return
            embedding = gemma.embed_tokens(np.array([[token]]), table, config.text_config)  # of `<image>` too
            x = np.concatenate([x, embedding], axis=1)
            mask_ar = np.concatenate([mask_ar, [[1]]], axis=1)

    def _embed_image(self, pixel_values: Array | None, p: Params) -> Array | None:
        pixel_values = self._pixels(pixel_values)
        if not len(pixel_values):
            return None
        return embed_image((p / "pixel_values").emit(pixel_values), p, self.config)

    def _pixels(self, pixel_values: Array | None) -> Array:  # -> (I, 3, S, S)
        """The images, checked; an empty array if there are none."""
        size = self.config.vision_config.image_size
        pixel_values = np.zeros((0, 3, size, size)) if pixel_values is None else np.asarray(pixel_values)
        if pixel_values.shape[1:] != (3, size, size) or pixel_values.dtype.kind != "f":
            wanted = f"this model takes floating-point numbers (I, 3, {size}, {size})"
            raise PaliGemmaError(f"pixel_values are {pixel_values.dtype} {pixel_values.shape}; {wanted}")
        if not np.isfinite(pixel_values).all():
            raise PaliGemmaError("pixel_values hold NaN or infinity: look at how the images were made")
        return pixel_values

    @staticmethod
    def _rows(
        input_ids: Array, attention_mask: Array | None, token_type_ids: Array | None
    ) -> tuple[Array, Array, Array]:
        """input_ids, input_mask and mask_ar, (B, T) each; mask_ar is 0 for the prefix and 1 for the
        suffix."""
        input_ids = np.asarray(input_ids)
        shape = input_ids.shape
        input_mask = np.ones(shape) if attention_mask is None else np.asarray(attention_mask)
        mask_ar = np.zeros(shape) if token_type_ids is None else np.asarray(token_type_ids)
        input_mask, mask_ar = input_mask.astype(bool), mask_ar.astype(int)
        if input_ids.dtype.kind not in "iu" or input_ids.ndim != 2 or not input_ids.size:
            wanted = "they must be whole numbers (B, T), at least one"
            raise PaliGemmaError(f"input_ids are {input_ids.dtype} {shape}; {wanted}")
        if not shape == input_mask.shape == mask_ar.shape:
            others = f"attention_mask {input_mask.shape}, token_type_ids {mask_ar.shape}"
            raise PaliGemmaError(f"input_ids {shape}, {others}: all must be one (B, T)")
        for b, valid in enumerate(input_mask):
            if not valid.any():
                raise PaliGemmaError(f"row {b} of attention_mask has no token at all")
            if (np.diff(mask_ar[b, valid]) < 0).any():
                raise PaliGemmaError("token_type_ids has a 0 after a 1: a prefix must come before its suffix")
        return input_ids, input_mask, mask_ar


def sample(logits: Array, temperature: float, top_p: float, u: float) -> int:  # (V,) -> a token
    """The token at which the cumulative probability within the nucleus exceeds `u` in [0, 1): Holtzman et al.
    2019, arXiv:1904.09751.

    The nucleus is the smallest set of most probable tokens whose probability reaches top_p; among equally
    probable tokens, lower ids come first. At temperature 0 it is the most probable token."""
    if temperature == 0:
        return int(np.argmax(logits))
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # at a tiny temperature all but the best become -inf
        probabilities = softmax((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    size = min(int(np.searchsorted(cumulative, top_p, side="left")) + 1, len(order))
    index = np.searchsorted(cumulative, u * cumulative[size - 1], side="right")
    return int(order[min(int(index), size - 1)])


def load(
    model: str | Path, dtype: type | str = np.float64, *, adapter: str | Path | None = None,
    full_attention: bool = False,
) -> Reference:  # fmt: skip
    """The reference for a checkpoint: a directory, or one of Google's .npz files. The weights stay in their
    files.

    dtype: np.float64 (the correct numbers), np.float32, or "bfloat16"/"float16" (see Reference). adapter: the
    directory of a LoRA adapter. full_attention: ignore the sliding windows of PaliGemma 2."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ARITHMETIC:
        raise PaliGemmaError(f"dtype is {name!r}; the reference computes in {', '.join(ARITHMETIC)}")
    config, stored = checkpoint.load(model, adapter=adapter, full_attention=full_attention)
    return Reference(config, Params(stored, name))
