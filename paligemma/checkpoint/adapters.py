"""LoRA adapters as the peft library saves them: adds their tensors (adapter_model.safetensors) to a model's
parameters. No torch, no NumPy.

Hu et al. 2021, arXiv:2106.09685: a matrix W becomes W + scale * B A, where scale is alpha / r, or alpha /
sqrt(r) with rslora. A setting that would change the model in any other way is an error that names it."""

import math
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ..command import tell
from ..errors import PaliGemmaError
from ..fields import shown
from .adapter_config import CONFIG, MERGE, WEIGHTS, alpha, is_slow, is_target, rank, read_config
from .safetensors_file import read_header, same_values
from .stored import EMBEDDING, HEAD, ITEMSIZE, StoredTensor, Update, canonical_name, listed

PREFIX = "base_model.model."


def applied(directory: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The parameters of a model, with the changes that the adapter adds to some of them. If the adapter was
    saved with an embedding or an output head, these replace the model's.

    Raises PaliGemmaError for an adapter of another kind or model, and for tensors that are not supported."""
    config, weights = read_config(directory), directory / WEIGHTS
    factors, own = _read_tensors(weights)
    changed = _with_own(directory, stored, own)
    for module, pair in factors.items():
        name = canonical_name(f"{module}.weight")
        _check_layer(directory, module, name, stored)
        if pair.keys() != {"A", "B"}:
            raise PaliGemmaError(
                f"{weights}: {module!r} has only lora_{min(pair)} of its two factors: save it again"
            )
        if changed[name].update is not None:
            raise PaliGemmaError(f"{weights} adapts {name} twice")
        (down, up), (out, features) = (pair["A"].shape, pair["B"].shape), changed[name].shape
        if len(down) != 2 or down[0] == 0 or down[1:] != (features,) or up != (out, down[0]):
            shapes = f"A {down} and B {up} for {module!r}, which is {(out, features)} here"
            base = shown(config.get("base_model_name_or_path"))
            raise PaliGemmaError(f"{directory} has {shapes}: it was trained on another model, {base}")
        differ = "the two files belong to different adapters"
        if not is_target(config, module):
            raise PaliGemmaError(
                f"{directory}: its tensors adapt {module!r}, and its {CONFIG} does not: {differ}"
            )
        r, a = rank(config, module), alpha(config, module)
        if r != down[0]:
            ranks = f"the rank (r, rank_pattern) of {module!r} is {r}; its tensors have {down[0]}"
            raise PaliGemmaError(f"{directory / CONFIG}: {ranks}: {differ}")
        scale = a / (math.sqrt(r) if config.get("use_rslora") else r)
        changed[name] = replace(changed[name], update=Update(pair["A"], pair["B"], scale))
    if lacking := _without_factors(config, stored, factors):
        layers = f"{len(lacking)} of the layers that {CONFIG} adapts ({listed(lacking, 2)})"
        tell(f"{weights} has nothing for {layers}: they stay as in the model")
    return changed


def _read_tensors(weights: Path) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """The factors "A" and "B" of each adapted module, by the name that peft gives the module, and the
    embedding and output head in the adapter's file, by canonical name."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    own: dict[str, StoredTensor] = {}
    adapters: set[str | None] = set()  # names of the adapters in the file; None if the tensors do not say one
    for tensor in read_header(weights):
        tensor = replace(tensor, adapter=True)
        says = f"{weights}: tensor {tensor.name!r} is"
        if tensor.dtype not in ITEMSIZE:
            raise PaliGemmaError(f"{says} {tensor.dtype}; only {', '.join(ITEMSIZE)} are supported")
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight", tensor.name)
        name = canonical_name(tensor.name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if match:
            adapters.add(match[3])
            module = match[1].removeprefix(PREFIX)
            pair = factors.setdefault(module, {})
            if match[2] in pair and len(adapters) == 1:
                raise PaliGemmaError(f"{weights} adapts {canonical_name(f'{module}.weight')} twice")
            pair[match[2]] = tensor
        elif name in own:
            raise PaliGemmaError(f"{says} the same parameter as {own[name].name!r}")
        elif name in (EMBEDDING, HEAD):
            own[name] = tensor
        else:
            raise PaliGemmaError(f"{says} not part of a LoRA of linear layers; nothing else is implemented")
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters))
        raise PaliGemmaError(f"{weights} holds several adapters ({names}): save only the one that you want")
    if not factors:
        raise PaliGemmaError(f"{weights} holds no tensor of a LoRA")
    return factors, own


def _check_layer(directory: Path, module: str, name: str, stored: dict[str, StoredTensor]) -> None:
    """Raise PaliGemmaError if an adapted module, whose weight is the parameter `name`, is not a linear layer
    of the model."""
    axes = len(stored[name].shape) if name in stored else 0
    adapts = f"{directory}: it adapts {module!r}"
    if name == HEAD and HEAD not in stored:
        tied = "and the model ties its output head to its embedding"
        raise PaliGemmaError(f"{adapts}, {tied}, which is not implemented: {MERGE}")
    if axes > 2:
        raise PaliGemmaError(f"{adapts}, a convolution, which is not implemented: {MERGE}")
    if axes != 2 or name == EMBEDDING or "position_embedding" in name:
        unsupported = "it is for another model, or adapts a layer that is not supported"
        raise PaliGemmaError(f"{adapts}, which is not a linear layer of this model: {unsupported}")


def _without_factors(config: dict, stored: dict[str, StoredTensor], factors: Collection[str]) -> list[str]:
    """The linear layers that the configuration adapts and the file does not, under the names that the file
    would use for them; an empty list if it is not clear which layers the configuration adapts."""
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets != "all-linear" and is_slow(targets)):
        return []
    prefixes = {  # canonical prefix -> the file's prefix; these are the ones of transformers 5
        "vision_tower.vision_model.": "model.vision_tower.",
        "language_model.model.": "model.language_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    adapted = {canonical_name(f"{module}.weight").removesuffix(".weight"): module for module in factors}
    for name, module in adapted.items():
        for tower in prefixes:
            if name.startswith(tower):
                prefixes[tower] = module.removesuffix(name.removeprefix(tower))
    matrices = [name for name, x in stored.items() if name.endswith(".weight") and len(x.shape) == 2]
    linear = [name.removesuffix(".weight") for name in matrices]
    modules = [
        prefix + name.removeprefix(tower)
        for name in linear
        for tower, prefix in prefixes.items()
        if name.startswith(tower) and name not in adapted
    ]
    tables = ("embed_tokens", "position_embedding")
    return [module for module in modules if not module.endswith(tables) and is_target(config, module)]


def _with_own(
    directory: Path, stored: dict[str, StoredTensor], own: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The parameters, with the adapter's own embedding and head in place of the model's. Raises
    PaliGemmaError if these were trained and are tied: peft and transformers disagree about the meaning."""
    for tensor in own.values():
        if tensor.shape != stored[EMBEDDING].shape:
            shapes = f"{tensor.name!r} with shape {tensor.shape}; the model's is {stored[EMBEDDING].shape}"
            raise PaliGemmaError(f"{directory} has {shapes}: the vocabulary was changed in training: {MERGE}")
    if HEAD in stored:
        return {**stored, **own}
    embedding, head = own.get(EMBEDDING, stored[EMBEDDING]), own.get(HEAD, stored[EMBEDDING])
    if same_values(embedding, head):
        return {**stored, EMBEDDING: embedding}
    names = " and ".join(repr(tensor.name) for tensor in own.values())
    trained = "an embedding or an output head that was trained, and the model ties these"
    raise PaliGemmaError(
        f"{directory / WEIGHTS}: {names} {'are' if len(own) > 1 else 'is'} {trained}: {MERGE}"
    )
