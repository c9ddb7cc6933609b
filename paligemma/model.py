"""PaliGemma in PyTorch: image tokens, then text. Read it beside reference/model.py."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from . import backend as backends
from . import fused, gemma, siglip
from .attention_range import Positions
from .config import PaliGemmaConfig
from .decode_state import DecodeState
from .gemma import LanguageModel
from .generation import GenerativeModel
from .kv_cache import KVCache
from .layers import Linear
from .options import Sampling, check_log_probs, end_tokens, token_count
from .packing import is_packed, pack
from .padding import UnpaddedBatch, pixels, token_ids, unpad
from .siglip import VisionTower


class Projector(nn.Module):
    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = Linear(config.vision_config.hidden_size, config.text_config.hidden_size, bias=True)


class PaliGemma(GenerativeModel):
    """PaliGemma (SigLIP and Gemma) and PaliGemma 2 (SigLIP and Gemma 2), for inference only. `load_hf_model`
    creates it and loads its weights.

    It computes in its own dtype, even inside torch.autocast. On a GPU, `stream` and `generate` replay CUDA
    graphs, which call no hooks and read the weights at the addresses at which they were captured: change
    weights in place, or through this module's own methods. On a CPU, they run lists of calls of kernels,
    which call no hooks either. If `graphs` is False, every kernel is launched from the host, and every layer
    is called. Fused operations call no hooks of their modules; `self_attn` and `mlp` of the decoder hold
    parameters and are never called."""

    def __init__(
        self, config: PaliGemmaConfig, backend: str = "torch", quantize: str | None = None, head: bool = False
    ):
        super().__init__(config, backend)
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config, quantize, head)
        self.size = sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def table(self) -> Tensor:
        """The embeddings of the tokens, (V, E)."""
        return self.language_model.model.embed_tokens.weight

    def computing(self, tokens: int) -> AbstractContextManager:
        return backends.computing(self.backend, self.device, self.size, tokens)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (B, T, V) float32 at every position, and zeros at padding.

        input_ids (B, T) hold `<image>` once for each patch; pixel_values (I, 3, S, S) are the images of all
        rows, in order; attention_mask (B, T) is 0 at padding, left or right; token_type_ids (B, T) are 0 for
        images and prompt, which see one another, and 1 for a causal suffix. Arrays and lists are accepted
        too. Raises PaliGemmaError for inputs that do not fit together."""
        input_ids = token_ids(input_ids)
        batch, pixel_values = self.unpad(input_ids, pixel_values, attention_mask, token_type_ids)
        B, T = batch.input_ids.shape
        self.config.text_config.check_positions(T)
        batch = batch.to(self.device)
        cache = KVCache(self.config.text_config, B, T, self.dtype, self.device)
        hidden = self.hidden(batch, pixel_values, cache)
        return self.logits(batch.padded(hidden, input_ids.shape[1]))

    def generate(
        self, input_ids: Tensor, pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, *,
        max_new_tokens: int = 100, temperature: float | None = None, top_p: float = 1.0,
        do_sample: bool | None = None, eos_token_id: int | list[int] | None = None,
        seed: int | None = None, log_probs: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """New tokens (B, N), N <= max_new_tokens. Each row ends with its own end token, followed by the pad
        token.

        Greedy, unless a temperature above 0, a top_p below 1 or do_sample=True is given; do_sample=True
        samples at temperature 1 if no temperature is given. With do_sample=False it is greedy whatever else
        is given. eos_token_id: one id or several, instead of the checkpoint's; with -1 no token ends a row.
        Inputs are as in `forward`, seed and log_probs as in `stream`."""
        inputs = (input_ids, pixel_values, attention_mask, token_type_ids)
        sampling = Sampling.asked(do_sample, temperature, top_p, seed)
        columns = self._stream(inputs, max_new_tokens, sampling, eos_token_id, log_probs)
        return torch.stack(list(columns), dim=1).to(self.device)

    def stream(
        self, input_ids: Tensor, pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, *,
        max_new_tokens: int = 100, temperature: float = 0.0, top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None, log_probs: list[Tensor] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The columns of what `generate` returns, (B,) each, on the CPU, each as soon as it is known. Greedy
        at temperature 0.

        seed: with the same whole number the same tokens are sampled; with None, different tokens each time.

        A list given as `log_probs` receives, before each column, the logarithms (B,) of its tokens'
        probabilities: the softmax of the model's own logits, whatever temperature and top_p; 0 after a row's
        end. The arguments are checked by this call, before the first column is requested."""
        inputs = (input_ids, pixel_values, attention_mask, token_type_ids)
        sampling = Sampling(temperature, top_p, seed)
        return self._stream(inputs, max_new_tokens, sampling, eos_token_id, log_probs)

    def _stream(
        self, inputs: tuple[Any, ...], max_new_tokens: int, sampling: Sampling, eos_token_id: Any,
        log_probs: list[Tensor] | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        count = token_count(max_new_tokens)
        check_log_probs(log_probs)
        own = self.config.eos_token_ids
        ends = own if eos_token_id is None else end_tokens(eos_token_id, len(self.table))
        batch, pixel_values = self.unpad(*inputs)
        self.config.text_config.check_positions(batch.input_ids.shape[1] + count - 1)
        return self.tokens(batch, pixel_values, count, sampling, ends, log_probs)

    def unpad(
        self, input_ids: Any, pixel_values: Any = None, attention_mask: Any = None, token_type_ids: Any = None
    ) -> tuple[UnpaddedBatch, Tensor | None]:
        """The checked inputs of `forward`: the batch without its padding, and the images. They stay on their
        devices."""
        ids, images = token_ids(input_ids), pixels(pixel_values, self.config.vision_config.image_size)
        return unpad(self.config, len(self.table), ids, images, attention_mask, token_type_ids), images

    def first_logits(
        self, cache: KVCache, batch: UnpaddedBatch, pixel_values: Tensor | None, argmax_scratch: Tensor
    ) -> Tensor:
        cache.length.zero_()
        hidden = self._hidden(batch, pixel_values, cache)
        cache.length.sub_(1)  # the position of the last token, as after every other step
        last = hidden[torch.arange(len(hidden), device=self.device), batch.length - 1]
        with self.computing(len(last)):
            return self.language_model.logits(last[:, None], argmax_scratch)[:, 0]

    def next_logits(self, cache: KVCache, x: Tensor, positions: Positions, argmax_scratch: Tensor) -> Tensor:
        language = self.language_model
        if self.graphs:
            return language.next(x, cache, positions, argmax_scratch)[:, 0]
        return language.logits(language.model(x, cache, positions), argmax_scratch)[:, 0]

    def hidden(self, batch: UnpaddedBatch, pixel_values: Tensor | None, cache: KVCache) -> Tensor:
        """The hidden states (B, T, E) of a whole input, for `logits`. Fills the cache, which must be
        empty."""
        with self.computing(batch.input_ids.numel()):
            return self._hidden(batch, pixel_values, cache)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., E) -> (..., V) float32
        with self.computing(hidden.shape[:-1].numel()):
            return self.language_model.logits(hidden)

    def _hidden(self, batch: UnpaddedBatch, pixel_values: Tensor | None, cache: KVCache) -> Tensor:
        cache.prefix.copy_(batch.prefix)
        positions = self.language_model.model.next_positions(cache, batch.input_ids.shape[1])
        hidden = fused.resolve(self.language_model.model(self.embed(batch, pixel_values), cache, positions))
        cache.length.copy_(batch.length)
        return hidden

    def embed(self, batch: UnpaddedBatch, pixel_values: Tensor | None) -> Tensor:  # -> (B, T, E)
        """The embeddings of text from the table, and at `<image>` tokens the projected patches, in order."""
        x = self.language_model.model.embed_tokens(batch.input_ids)
        if pixel_values is None:
            return x
        patches = self.embed_image(pixel_values).flatten(0, 1)  # of all images, (I * P, E)
        return torch.where(batch.patch[..., None] >= 0, patches[batch.patch.clamp(min=0)], x)

    def embed_image(self, pixel_values: Tensor) -> Tensor:  # (I, 3, S, S) -> (I, P, E)
        """The projected patches, which enter the decoder unscaled."""
        features = self.vision_tower.vision_model(pixel_values.to(self.device, self.dtype))
        return self.multi_modal_projector.linear(features)

    def packable(self) -> Iterator[tuple[Linear, ...]]:
        """The groups of modules that one product computes if their weights are packed."""
        for module in self.modules():
            if isinstance(module, (siglip.SelfAttention, gemma.SelfAttention)):
                yield module.q_proj, module.k_proj, module.v_proj
            elif isinstance(module, gemma.MLP):
                yield module.gate_proj, module.up_proj

    def new_state(self, batch: int, capacity: int, **kind: bool) -> DecodeState:
        """A state for `batch` rows. A copied model's weights are packed first, because graphs hold their
        addresses."""
        for group in self.packable() if self.backend == "triton" else ():
            if not is_packed(group):
                pack(group)
        return super().new_state(batch, capacity, **kind)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PaliGemma":
        """nn.Module moves and converts weights one by one, which unpacks them. Pack them again."""
        groups = [group for group in self.packable() if is_packed(group)]
        super()._apply(fn, recurse)
        for group in groups:
            pack(group)
        return self

    def damage(self) -> str:
        """Which weights hold the NaN or infinity that reached the logits. For a quantised weight it is in the
        scale. On a CPU, torch's fused attention hides a NaN in q or k if there are fewer than 16 keys, but
        every image has more patches than that."""
        overflows = ""
        for name, weight in self.named_parameters():
            if weight.itemsize == 1:
                continue
            if bool(weight.isnan().any()) or (weight.dtype != torch.float16 and bool(weight.isinf().any())):
                own = name.removesuffix("_scale")
                return f"the weights {own} hold NaN or infinity: the checkpoint is damaged"
            if not overflows and bool(weight.isinf().any()):
                overflows = f"the weights {name} overflow float16, whose largest number is 65504"
        overflows = overflows or f"the model's outputs overflow {self.dtype}"
        return f"{overflows}: use bfloat16 or float32"
