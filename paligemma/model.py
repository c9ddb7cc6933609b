"""PaliGemma, beside reference/model.py: image tokens, then text; one prefill, then a token at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu_linear, gemma, ops, siglip
from .config import PaliGemmaConfig, check_sampling, end_tokens, sampling_temperature, shown
from .errors import PaliGemmaError
from .gemma import LanguageModel
from .generation import GRAPHS, TEXT, Generation, Idle, bucket
from .kv_cache import KVCache
from .layers import Linear, pack
from .sampling import uniform
from .siglip import VisionTower

SMALL = 1 << 24  # parameters of a model that one thread of a CPU reads in 2 ms
BRIEF = 1 << 30  # parameters times tokens: the products that one thread computes in 20 ms


class Rows(NamedTuple):
    """A batch without its padding: each row's valid tokens moved to the front. What lies behind a row's length is unused."""

    input_ids: Tensor  # (B, T), 0 in the place of images
    patch: Tensor  # (B, T) the index of the patch that stands there, or -1
    length: Tensor  # (B,) valid tokens
    prefix: Tensor  # (B,) of these, the ones that see one another; the others are a causal suffix
    origin: Tensor  # (B, T) where each token stood in the padded batch

    @classmethod
    def pack(cls, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> "Rows":
        """Raises PaliGemmaError when shapes differ, a row is empty, or a prefix token follows a suffix token."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else flags("attention_mask", attention_mask)
        suffix = torch.zeros_like(valid) if token_type_ids is None else flags("token_type_ids", token_type_ids)
        if not input_ids.shape == valid.shape == suffix.shape or input_ids.ndim != 2:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("input_ids", input_ids), ("attention_mask", valid), ("token_type_ids", suffix)))
            raise PaliGemmaError(f"shapes that must all be one (B, T): {shapes}")
        length = valid.sum(dim=1)
        if not bool(length.all()):
            raise PaliGemmaError(f"row {int(length.argmin())} of attention_mask has no token at all")
        origin = (~valid).int().argsort(dim=1, stable=True)[:, : int(length.max())]
        suffix = (suffix & valid).gather(1, origin)
        prefix = length - suffix.sum(dim=1)
        position = torch.arange(origin.shape[1], device=origin.device)
        if bool((suffix & (position < prefix[:, None])).any()):
            raise PaliGemmaError("token_type_ids has a 0 (prefix) after a 1 (suffix); the prefix comes first")
        return cls(input_ids.gather(1, origin), torch.full_like(origin, -1), length, prefix, origin)

    def padded(self, T: int) -> "Rows":
        """With unused places behind them, up to T."""
        more = (0, T - self.input_ids.shape[1])
        return self._replace(input_ids=F.pad(self.input_ids, more), patch=F.pad(self.patch, more, value=-1), origin=F.pad(self.origin, more))

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(x.to(device) for x in self))


def tensor(name: str, value: Any) -> Tensor:
    """A tensor from one, from an array or from lists."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError, RuntimeError):  # no array, or one of a dtype that torch does not have
        raise PaliGemmaError(f"{name} is {shown(value)}; it must be a tensor, an array, or lists of one length") from None


def token_ids(value: Any) -> Tensor:  # -> (B, T) int64
    ids = tensor("input_ids", value)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PaliGemmaError(f"input_ids are {ids.dtype}; token ids are whole numbers, such as int64")
    if ids.ndim != 2 or not ids.numel():
        raise PaliGemmaError(f"input_ids has shape {tuple(ids.shape)}; it must be (B, T), with at least one row and one token")
    return ids.long()


def flags(name: str, value: Tensor) -> Tensor:  # -> bool
    on = value != 0
    if not bool((on == value).all()):
        raise PaliGemmaError(f"{name} holds {value[on != value][0].item()}; it must hold 0 and 1 only")
    return on


class Projector(nn.Module):
    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = Linear(config.vision_config.hidden_size, config.text_config.hidden_size, bias=True)


class PaliGemma(nn.Module):
    """PaliGemma 1 (SigLIP and Gemma) and 2 (SigLIP and Gemma 2). Made and filled by `load_hf_model`; inference only.

    It computes in its own dtype inside torch.autocast as well. On a GPU, `stream` and `generate` replay CUDA graphs, which call no hooks and
    read the weights where they were: change these in place, or through this module's own methods. With `graphs` False every kernel is launched
    from the host."""

    def __init__(self, config: PaliGemmaConfig, backend: str = "torch", quantize: str | None = None, head: bool = False):
        super().__init__()
        self.config, self.backend, self.graphs = config, backend, GRAPHS
        self._idle = Idle()
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config, quantize, head)
        self._size = sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    def packed(self) -> Iterator[tuple[Linear, ...]]:
        """Layers that one product makes, where their weights lie together."""
        for module in self.modules():
            if isinstance(module, (siglip.SelfAttention, gemma.SelfAttention)):
                yield module.q_proj, module.k_proj, module.v_proj
            elif isinstance(module, gemma.MLP):
                yield module.gate_proj, module.up_proj

    def embed_image(self, pixel_values: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, P, E)
        """Projected patch embeddings, which enter the decoder as they are."""
        features = self.vision_tower.vision_model(pixel_values.to(self.device, self.dtype))
        return self.multi_modal_projector.linear(features)

    def embed(self, rows: Rows, pixel_values: Tensor | None) -> Tensor:  # -> (B, T, E)
        """Text rows from the table, `<image>` places from the projected patches, in order."""
        x = self.language_model.model.embed_tokens(rows.input_ids)
        if pixel_values is None:
            return x
        patches, patch = self.embed_image(pixel_values), rows.patch[..., None]
        return torch.where(patch >= 0, patches.gather(1, patch.clamp(min=0).expand_as(x)), x)

    def hidden(self, rows: Rows, pixel_values: Tensor | None, cache: KVCache) -> Tensor:  # -> (B, T, E)
        """Hidden states of the whole input, which `logits` takes; its keys and values are in the cache then, which was empty."""
        with self._computing(rows.input_ids.numel()):
            cache.prefix.copy_(rows.prefix)
            places = self.language_model.model.places(cache, rows.input_ids.shape[1])
            hidden = ops.whole(self.language_model.model(self.embed(rows, pixel_values), cache, places))
            cache.length.copy_(rows.length)
            return hidden

    def prefill(self, run: Generation, rows: Rows, pixel_values: Tensor | None) -> Tensor:  # -> (B, V) float32
        """The logits of each row's first token."""
        run.cache.length.zero_()
        hidden = self.hidden(rows, pixel_values, run.cache)
        run.cache.length.sub_(1)  # of the last token, as behind every other pass
        last = hidden[torch.arange(len(hidden), device=self.device), rows.length - 1]
        return self._logits(run, last[:, None])

    def decode(self, run: Generation) -> Tensor:  # -> (B, V) float32
        """Append the token that each row said last; the logits of what follows it."""
        with self._computing(len(run.row)):
            hidden = self.language_model.model(run.following.x, run.cache, run.places())
        return self._logits(run, hidden)

    def accept(self, run: Generation, logits: Tensor, tokens: Tensor | None = None) -> None:  # (B, V), (B,)
        """Have the rows say these tokens, or those that the logits make."""
        with self._computing(len(run.row)):
            run.accept(logits, self.language_model.model.embed_tokens.weight, tokens)

    def _logits(self, run: Generation, hidden: Tensor | ops.Sum) -> Tensor:  # (B, 1, E) -> (B, V) float32
        with self._computing(len(run.row)):
            return self.language_model.logits(hidden, None if run.sampled else run.following.best)[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:  # (..., E) -> (..., V) float32
        with self._computing(hidden.shape[:-1].numel()):
            return self.language_model.logits(hidden)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) float32 at every position; zeros at padding.

        input_ids (B, T) holds `<image>` once for each patch; pixel_values (B, 3, S, S); attention_mask (B, T) is 0 at padding,
        left or right; token_type_ids (B, T) is 0 for image and prompt, which see one another, and 1 for a causal suffix. Arrays and lists are taken
        as well. Raises PaliGemmaError for inputs that do not fit together."""
        input_ids, pixel_values = token_ids(input_ids), self._pixels(pixel_values)
        rows = self._rows(input_ids, pixel_values, attention_mask, token_type_ids)
        self.config.text_config.check_positions(rows.input_ids.shape[1])
        rows = rows.to(self.device)
        B, T = rows.input_ids.shape
        packed = self.hidden(rows, pixel_values, KVCache(self.config.text_config, B, T, self.dtype, self.device))
        hidden = packed.new_zeros(*input_ids.shape, packed.shape[-1])
        row, t = (torch.arange(packed.shape[1], device=self.device) < rows.length[:, None]).nonzero(as_tuple=True)
        hidden[row, rows.origin[row, t]] = packed[row, t]
        return self.logits(hidden)

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        max_new_tokens: int = 100,
        temperature: float | None = None,
        top_p: float = 1.0,
        do_sample: bool | None = None,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        log_probs: list[Tensor] | None = None,
    ) -> Tensor:
        """New tokens (B, N), N <= max_new_tokens. Each row ends with its own end token and holds the pad id from there.

        Greedy, unless a temperature above 0 or a top_p below 1 is given, or do_sample=True, which samples at temperature 1 where none is given.
        With do_sample=False it is greedy whatever else is given. eos_token_id: one id or several, in place of the checkpoint's; -1 is an end
        that never comes. Inputs as in `forward`, seed and log_probs as in `stream`."""
        temperature = sampling_temperature(do_sample, temperature, top_p)
        steps = self.stream(
            input_ids, pixel_values, attention_mask, token_type_ids, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, eos_token_id=eos_token_id, seed=seed, log_probs=log_probs,
        )  # fmt: skip
        return torch.stack(list(steps), dim=1).to(self.device)

    @torch.inference_mode(False)  # what is made here is changed by later calls, which may be made outside of that mode
    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        log_probs: list[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The columns of what `generate` returns, (B,) each and on the CPU, as soon as each is known. Greedy at temperature 0.

        seed: a whole number, which repeats what is sampled; None for another answer each time.

        A list given as `log_probs` receives, before each column, the logarithms (B,) of its tokens' probabilities: the softmax of
        the model's own logits, whatever temperature and top_p; 0 behind a row's end."""
        check_sampling(max_new_tokens, temperature, top_p, seed, log_probs)
        max_new_tokens, temperature, top_p = int(max_new_tokens), float(temperature), float(top_p)
        ends = self.config.eos_token_ids if eos_token_id is None else end_tokens(eos_token_id, self._vocabulary)
        input_ids, pixel_values = token_ids(input_ids), self._pixels(pixel_values)
        rows = self._rows(input_ids, pixel_values, attention_mask, token_type_ids)
        B, T = rows.input_ids.shape
        self.config.text_config.check_positions(T + max_new_tokens - 1)
        ends = torch.tensor(ends, dtype=torch.int64, device="cpu")
        recorded = self._recorded()
        if recorded:
            T = -(-T // TEXT) * TEXT
            rows = rows.padded(T)
        capacity, kinds = T + max_new_tokens, (temperature > 0, log_probs is not None)
        run = self._generation(B, bucket(capacity) if recorded else capacity, recorded, *kinds)
        inputs = rows if pixel_values is None else (*rows, pixel_values)

        def first(*inputs: Tensor) -> None:
            self.accept(run, self.prefill(run, Rows(*inputs[: len(rows)]), *inputs[len(rows) :] or (None,)))

        def next_one() -> None:
            self.accept(run, self.decode(run))

        launched, done = 0, torch.zeros(B, dtype=torch.bool, device="cpu")
        try:
            with self._on_device():
                run.begin(temperature, top_p, uniform(seed, B, max_new_tokens) if run.sampled else None)
            for n in range(max_new_tokens):
                with self._on_device():
                    while launched <= min(n + run.ahead, max_new_tokens - 1):
                        run.launch(next_one) if launched else run.launch(first, *inputs)
                        launched += 1
                    tokens, scores = run.read(n)
                if bool((tokens[~done] < 0).any()):
                    raise PaliGemmaError(self._damage())
                tokens.masked_fill_(done, self.config.pad_token_id)
                if log_probs is not None:
                    log_probs.append(scores.masked_fill_(done, 0.0))
                done |= torch.isin(tokens, ends)
                try:
                    yield tokens
                except GeneratorExit:  # the caller wants no more
                    run.finish()
                    self._idle.keep(run)
                    raise
                if bool(done.all()):
                    break
        finally:
            run.finish()
        self._idle.keep(run)

    def _recorded(self) -> bool:
        return self.graphs and self.backend == "triton" and self.device.type == "cuda" and not ops.unfused()

    def _generation(self, batch: int, capacity: int, recorded: bool = False, sampled: bool = False, scored: bool = False) -> Generation:
        """One that has ended, with its graphs, or a new one."""
        if recorded and (run := self._idle.take(batch, capacity, sampled, scored)):
            return run
        kernels = self.backend == "triton"
        for group in self.packed() if kernels else ():  # of a copied model; a graph knows where its weights were
            if ops.packed(*(linear.weight for linear in group)) is None:
                pack(group)
        return Generation(self.config, batch, capacity, self.dtype, self.device, kernels=kernels, recorded=recorded, sampled=sampled, scored=scored)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PaliGemma":
        """What nn.Module does when it is moved or converted takes packed weights apart: put them together again."""
        self._idle = Idle()  # graphs know where the parameters were
        packed = [group for group in self.packed() if ops.packed(*(linear.weight for linear in group)) is not None]
        super()._apply(fn, recurse)
        for group in packed:
            pack(group)
        return self

    def load_state_dict(self, *args, **kwargs) -> Any:
        self._idle = Idle()
        return super().load_state_dict(*args, **kwargs)

    @property
    def held_bytes(self) -> int:
        """What caches and graphs of answers that have ended hold, for the next ones."""
        return sum(run.nbytes for run in self._idle.runs)

    @contextmanager
    def _computing(self, tokens: int) -> Iterator[None]:
        """With this model's backend and dtype, on its device; on a CPU, with as many threads as a pass of so many tokens deserves."""
        cpu = self.device.type == "cpu"
        brief = self._size < SMALL and self._size * tokens < BRIEF
        alone = brief or (self.backend == "numba" and tokens == 1)  # Numba's kernel has threads of its own; what torch does beside it is small
        with (
            ops.use(self.backend),
            torch.autocast(self.device.type, enabled=False),
            self._on_device(),
            cpu_linear.one_thread() if cpu and alone else nullcontext(),
        ):
            yield

    def _on_device(self) -> AbstractContextManager:
        """Triton launches on the current device, whatever the device of the tensors."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _rows(self, input_ids: Tensor, pixel_values: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Rows:
        """The batch, checked, where its tensors are."""
        masks = ("attention_mask", attention_mask), ("token_type_ids", token_type_ids)
        attention_mask, token_type_ids = (x if x is None else tensor(name, x).to(input_ids.device) for name, x in masks)
        rows = Rows.pack(input_ids, attention_mask, token_type_ids)
        valid = torch.arange(rows.input_ids.shape[1], device=rows.length.device) < rows.length[:, None]
        is_image = (rows.input_ids == self.config.image_token_index) & valid
        images, patches = (0, 0) if pixel_values is None else (len(pixel_values), self.config.vision_config.num_patches)
        counts = is_image.sum(dim=1).tolist()
        if images not in (0, len(counts)) or any(count != patches for count in counts):
            raise PaliGemmaError(f"the rows of input_ids hold {counts} <image> tokens, for {images} images; each row has {patches} for its one")
        ids = rows.input_ids.masked_fill(is_image | ~valid, 0)
        if bool(((ids < 0) | (ids >= self._vocabulary)).any()):
            raise PaliGemmaError(f"input_ids has {int(ids.max())} and {int(ids.min())}; token ids are 0 to {self._vocabulary - 1}")
        patch = (is_image.cumsum(dim=1) - 1).masked_fill(~is_image, -1)
        return rows._replace(input_ids=ids, patch=patch)

    def _pixels(self, pixel_values: Any) -> Tensor | None:  # -> (B, 3, S, S)
        """The images, checked."""
        if pixel_values is None:
            return None
        pixels, size = tensor("pixel_values", pixel_values), self.config.vision_config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise PaliGemmaError(f"pixel_values has shape {tuple(pixels.shape)}; this model takes (B, 3, {size}, {size})")
        if not pixels.is_floating_point():
            raise PaliGemmaError(f"pixel_values are {pixels.dtype}; they must be floating-point, normalised as the processor does it: give it the images")
        if not bool(pixels.isfinite().all()):
            raise PaliGemmaError("pixel_values hold NaN or infinity: look at how the images were made")
        return pixels

    @property
    def _vocabulary(self) -> int:
        return self.language_model.model.embed_tokens.weight.shape[0]

    def _damage(self) -> str:
        """Which weights hold the NaN or infinity that reached the logits. An 8-bit weight has it in its scale. Of a NaN in q or k with fewer than
        16 keys nothing reaches the logits through torch's fused attention on a CPU; every image has more patches than that."""
        overflows = ""
        for name, weight in self.named_parameters():
            if weight.itemsize == 1:
                continue
            if bool(weight.isnan().any()) or (weight.dtype != torch.float16 and bool(weight.isinf().any())):
                return f"the weights {name.removesuffix('_scale')} hold NaN or infinity: the checkpoint is damaged"
            if not overflows and bool(weight.isinf().any()):
                overflows = f"the weights {name} overflow float16, whose largest number is 65504: use bfloat16 or float32"
        return overflows or f"the model's outputs overflow {self.dtype}: use bfloat16 or float32"
