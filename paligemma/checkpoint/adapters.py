"""LoRA adapters as the peft library saves them: adapter_config.json and adapter_model.safetensors. No torch,
no NumPy.

Hu et al. 2021, arXiv:2106.09685: a matrix W becomes W + scale * B A, where scale is alpha / r, or alpha /
sqrt(r) with rslora. A setting that would change the model in any other way is an error that names it."""

import math
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ..command import tell
from ..errors import PaliGemmaError
from ..fields import Fields, shown
from ..files import read_json
from . import folders
from .folders import ADAPTER_CONFIG as CONFIG
from .folders import ADAPTER_WEIGHTS as WEIGHTS
from .safetensors_file import read_header, same_values
from .stored import EMBEDDING, HEAD, ITEMSIZE, StoredTensor, Update, canonical_name, listed

PREFIX = "base_model.model."
INITIAL = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # ways to begin a training that leave the base model as it is
# What peft's config may ask for, and the values with which it asks for nothing.
NOTHING = {
    "use_dora": (False,), "modules_to_save": ([],), "bias": ("none",), "lora_bias": (False,), "fan_in_fan_out": (False,), "layer_replication": ([],),
    "trainable_token_indices": ([], {}), "target_parameters": ([],), "alora_invocation_tokens": ([],), "corda_config": ({},), "loftq_config": ({},),
    "use_qalora": (False,), "arrow_config": ({},), "use_bdlora": (False, {}), "kasa_config": ({},), "monteclora_config": ({},), "velora_config": ({},),
}  # fmt: skip


# What else peft's config has: the fields that are read here, and those that a merge does not depend on.
READ = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
)
READ += ("layers_pattern", "peft_type", "base_model_name_or_path", "revision")
WITHOUT_EFFECT = (
    "task_type",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "runtime_config",
)
WITHOUT_EFFECT += ("qalora_group_size", "eva_config", "lora_ga_config", "ensure_weight_tying")


def applied(directory: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The parameters of a model, with the changes that the adapter adds to some of them. If the adapter was
    saved with an embedding or an output head, these replace the model's.

    Raises PaliGemmaError for an adapter of another kind or model, and for tensors that are not supported."""
    config = read_config(directory)
    factors: dict[str, dict[str, StoredTensor]] = {}  # module, as peft names it -> "A" and "B"
    own: dict[str, StoredTensor] = {}  # the embedding and the head, by canonical name
    named: set[str | None] = set()
    for tensor in read_header(directory / WEIGHTS):
        tensor = replace(tensor, adapter=True)
        if tensor.dtype not in ITEMSIZE:
            raise PaliGemmaError(
                f"{directory / WEIGHTS}: tensor {tensor.name!r} is {tensor.dtype}; only {', '.join(ITEMSIZE)} are read"
            )
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight", tensor.name)
        name = canonical_name(tensor.name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if match:
            named.add(match[3])
            pair = factors.setdefault(match[1].removeprefix(PREFIX), {})
            if match[2] in pair and len(named) == 1:
                raise PaliGemmaError(
                    f"{directory / WEIGHTS} adapts {canonical_name(f'{match[1].removeprefix(PREFIX)}.weight')} twice"
                )
            pair[match[2]] = tensor
        elif name in own:
            raise PaliGemmaError(
                f"{directory / WEIGHTS}: {tensor.name!r} is the same parameter as {own[name].name!r}"
            )
        elif name in (EMBEDDING, HEAD):
            own[name] = tensor
        else:
            raise PaliGemmaError(
                f"{directory / WEIGHTS}: {tensor.name!r} is not part of a LoRA of linear layers, and nothing else is implemented"
            )
    if len(named) > 1:
        names = ", ".join(sorted(str(name) for name in named))
        raise PaliGemmaError(
            f"{directory / WEIGHTS} holds several adapters ({names}): save the one that is wanted alone"
        )
    if not factors:
        raise PaliGemmaError(f"{directory / WEIGHTS} holds no tensor of a LoRA")
    changed = _with_own(directory, dict(stored), own)
    for module, pair in factors.items():
        name = canonical_name(f"{module}.weight")
        if name == HEAD and HEAD not in stored:
            tied = f"{module!r}, and the model ties its output head to its embedding"
            raise PaliGemmaError(
                f"{directory}: it adapts {tied}, which is not implemented: merge the adapter with peft"
            )
        if name in stored and len(stored[name].shape) > 2:
            raise PaliGemmaError(
                f"{directory}: it adapts {module!r}, a convolution, which is not implemented: merge the adapter with peft"
            )
        if (
            name not in stored
            or len(stored[name].shape) != 2
            or name == EMBEDDING
            or "position_embedding" in name
        ):
            raise PaliGemmaError(
                f"{directory}: it adapts {module!r}, which is not a linear layer of this model: it is for another model, or adapts what is not implemented"
            )
        if pair.keys() != {"A", "B"}:
            raise PaliGemmaError(
                f"{directory / WEIGHTS}: {module!r} has only lora_{'A' if 'A' in pair else 'B'} of its two factors: save it again"
            )
        if changed[name].update is not None:
            raise PaliGemmaError(f"{directory / WEIGHTS} adapts {name} twice")
        (down, up), (out, features) = (pair["A"].shape, pair["B"].shape), changed[name].shape
        if len(down) != 2 or down[0] == 0 or down[1:] != (features,) or up != (out, down[0]):
            shapes = f"A {down} and B {up} for {module!r}, which is {(out, features)} here"
            raise PaliGemmaError(
                f"{directory} has {shapes}: it was trained on another model, {shown(config.get('base_model_name_or_path'))}"
            )
        if not _is_target(config, module):
            raise PaliGemmaError(
                f"{directory}: its tensors adapt {module!r}, and its {CONFIG} does not: they are not of one adapter"
            )
        rank, alpha = (
            _of_module(config, "rank_pattern", "r", module),
            _of_module(config, "alpha_pattern", "lora_alpha", module),
        )
        if rank != down[0]:
            raise PaliGemmaError(
                f"{directory / CONFIG}: the rank (r, rank_pattern) of {module!r} is {rank}; its tensors have {down[0]}: they are not of one adapter"
            )
        scale = alpha / (math.sqrt(down[0]) if config.get("use_rslora") else down[0])
        changed[name] = replace(changed[name], update=Update(pair["A"], pair["B"], scale))
    if lacking := _without_factors(config, stored, factors):
        tell(
            f"{directory / WEIGHTS} has nothing for {len(lacking)} of the layers that {CONFIG} adapts ({listed(lacking, 2)}): they stay as in the model"
        )
    return changed


def _without_factors(config: dict, stored: dict[str, StoredTensor], factors: Collection[str]) -> list[str]:
    """The linear layers that the configuration adapts and the file does not, under the names that the file
    would use for them; an empty list if it is not clear which layers the configuration adapts."""
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets != "all-linear" and _is_involved(targets)):
        return []
    own = {
        "vision_tower.vision_model.": "model.vision_tower.",
        "language_model.model.": "model.language_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    adapted = {canonical_name(f"{module}.weight").removesuffix(".weight"): module for module in factors}
    for name, module in adapted.items():
        for tower in own:
            if name.startswith(tower):
                own[tower] = module.removesuffix(name.removeprefix(tower))
    linear = [
        name.removesuffix(".weight")
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    ]
    modules = [
        prefix + name.removeprefix(tower)
        for name in linear
        for tower, prefix in own.items()
        if name.startswith(tower) and name not in adapted
    ]
    return [
        module
        for module in modules
        if not module.endswith(("embed_tokens", "position_embedding")) and _is_target(config, module)
    ]


def _with_own(
    directory: Path, stored: dict[str, StoredTensor], own: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The parameters, with the adapter's embedding and head in place of the model's. Raises PaliGemmaError if
    these were trained and are tied: peft and transformers disagree about the meaning."""
    for tensor in own.values():
        if tensor.shape != stored[EMBEDDING].shape:
            shapes = f"{tensor.name!r} with shape {tensor.shape}; the model's is {stored[EMBEDDING].shape}"
            raise PaliGemmaError(
                f"{directory} has {shapes}: the vocabulary was changed in training: merge the adapter with peft"
            )
    if HEAD in stored:
        return {**stored, **own}
    embedding, head = own.get(EMBEDDING, stored[EMBEDDING]), own.get(HEAD, stored[EMBEDDING])
    if same_values(embedding, head):
        return {**stored, EMBEDDING: embedding}
    names = " and ".join(repr(tensor.name) for tensor in own.values())
    trained = "an embedding or an output head that was trained, and the model ties these"
    raise PaliGemmaError(
        f"{directory / WEIGHTS}: {names} {'are' if len(own) > 1 else 'is'} {trained}: merge the adapter with peft"
    )


def base_model(directory: Path) -> tuple[str | None, str | None]:
    """The name and the revision of the base model that the adapter's configuration gives; None for
    neither."""
    config = read_json(directory / CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return (name if isinstance(name, str) and name else None), (
        revision if isinstance(revision, str) and revision else None
    )


def read_config(directory: Path) -> dict:
    """adapter_config.json of an adapter that can be merged. Raises PaliGemmaError for one that cannot."""
    folders.check_adapter(directory)
    config = read_json(directory / CONFIG)
    if "fine_tune_type" in config and "peft_type" not in config:
        raise PaliGemmaError(
            f"{directory} holds an adapter of MLX, which is not read: fuse it with its model with mlx_vlm, or train one with peft"
        )
    if config.get("peft_type") != "LORA":
        raise PaliGemmaError(
            f"{directory / CONFIG}: peft_type is {shown(config.get('peft_type'))}; only 'LORA' is implemented"
        )
    for name, values in NOTHING.items():
        if config.get(name) is not None and config[name] not in values:
            raise PaliGemmaError(
                f"{directory / CONFIG}: {name} is {shown(config[name])}, which is not implemented: merge the adapter with peft"
            )
    if type(config.get("use_rslora", False)) is not bool:
        raise PaliGemmaError(
            f"{directory / CONFIG}: use_rslora is {shown(config['use_rslora'])}; it must be true or false"
        )
    initial = config.get("init_lora_weights", True)
    if (
        initial is not None
        and (initial.lower() if str(initial).lower() == "gaussian" else initial) not in INITIAL
    ):
        raise PaliGemmaError(
            f"{directory / CONFIG}: init_lora_weights is {shown(initial)}, which changes the base model as well: convert the adapter with peft"
        )
    known = {*NOTHING, *READ, *WITHOUT_EFFECT}
    if unknown := [
        name for name, value in config.items() if name not in known and value not in (None, False, [], {}, "")
    ]:
        tell(
            f"{directory / CONFIG} has {listed([shown(name) for name in unknown])}, which peft 0.21 does not have: passed over"
        )
    _check_targets(Fields(CONFIG, "", config))
    if not os.path.lexists(directory / WEIGHTS):
        pickled = os.path.lexists(directory / "adapter_model.bin")
        raise PaliGemmaError(
            f"{directory} has no {WEIGHTS}"
            + (
                "; adapter_model.bin is a pickle, which is never opened: save it again with peft"
                if pickled
                else ""
            )
        )
    return config


def _check_targets(f: Fields) -> None:
    """Raise PaliGemmaError for values that peft refuses, in the fields that choose modules."""
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = f.values.get(name)
        if not (
            value is None
            or isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(x, str) for x in value))
        ):
            raise f.wrong(name, value, "a string, a list of strings or null")
    layers = f.values.get("layers_to_transform")
    if not (
        layers is None
        or all(type(i) is int and i >= 0 for i in (layers if isinstance(layers, list) else [layers]))
    ):
        raise f.wrong("layers_to_transform", layers, "the index of a layer, a list of these or null")
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(f.values.get("target_modules"), str) and f.values.get(name) is not None:
            raise f.wrong(name, f.values[name], "null, as target_modules is an expression and not a list")
    if f.values.get("layers_pattern") and layers is None:
        raise f.wrong("layers_pattern", f.values["layers_pattern"], "null, as layers_to_transform is")


def _is_target(config: dict, module: str) -> bool:
    """Whether the configuration adapts the module, as in peft's check_target_module_exists. Without
    target_modules, with "all-linear", or with an expression that could take too long, it adapts every
    module."""

    def found(field: str, otherwise: bool) -> bool:
        names = config.get(field)
        if names is None or names == "all-linear" or (isinstance(names, str) and _is_involved(names)):
            return otherwise
        if isinstance(names, str):
            return _match(names, module, field) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    if found("exclude_modules", otherwise=False) or not found("target_modules", otherwise=True):
        return False
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if layers is None or layers == []:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if _is_involved(pattern):
            raise PaliGemmaError(
                f"{CONFIG}: layers_pattern has {shown(pattern)}, which is too involved: merge the adapter with peft"
            )
        if index := _match(rf"(?:.*?\.)?(?:{pattern})\.(?P<index>\d+)\..*", module, "layers_pattern"):
            return int(index["index"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _of_module(config: dict, patterns: str, otherwise: str, module: str) -> float:
    """The value of the first pattern that matches the end of the module's name, else of the field
    `otherwise`."""
    f = Fields(CONFIG, "", config)
    by_pattern = config.get(patterns) or {}
    if not isinstance(by_pattern, dict):
        raise f.wrong(patterns, by_pattern, "an object")
    name = otherwise
    for pattern in by_pattern:
        if _is_involved(pattern):
            raise PaliGemmaError(
                f"{CONFIG}: {patterns} has {shown(pattern)}, which is too involved: merge the adapter with peft"
            )
        if _match(rf"(.*\.)?({pattern})", module, patterns):
            f, name = Fields(CONFIG, f"{patterns}.", by_pattern), pattern
            break
    if otherwise == "r":
        return f.integer(name, 8)  # peft's default, as the other one
    return f.number(name, 8, least=-1e6, most=1e6)


def _is_involved(pattern: str) -> bool:
    """Whether a regular expression could take too long to match."""
    return len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+?{]", pattern) is not None


def _match(pattern: str, module: str, field: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, module)
    except (re.error, OverflowError, RecursionError) as error:
        raise PaliGemmaError(
            f"{CONFIG}: {field} has {shown(pattern)}, which is not a regular expression ({shown(str(error))})"
        ) from None
