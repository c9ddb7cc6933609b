"""adapter_config.json of a LoRA adapter, as the peft library writes it: whether the adapter can be merged,
and which modules it adapts with which rank and alpha. No torch, no NumPy."""

import os
import re
from pathlib import Path

from ..command import tell
from ..errors import PaliGemmaError
from ..fields import Fields, shown
from ..files import read_json
from . import folders
from .folders import ADAPTER_CONFIG as CONFIG
from .folders import ADAPTER_WEIGHTS as WEIGHTS
from .stored import listed

# Values of init_lora_weights that leave the base model's weights unchanged.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Settings that are not implemented, each with the values that switch it off.
SWITCHED_OFF = {
    "use_dora": (False,), "modules_to_save": ([],), "bias": ("none",), "lora_bias": (False,),
    "fan_in_fan_out": (False,), "layer_replication": ([],), "trainable_token_indices": ([], {}),
    "target_parameters": ([],), "alora_invocation_tokens": ([],), "corda_config": ({},),
    "loftq_config": ({},), "use_qalora": (False,), "arrow_config": ({},), "use_bdlora": (False, {}),
    "kasa_config": ({},), "monteclora_config": ({},), "velora_config": ({},),
}  # fmt: skip
# The other fields of peft's configuration: those that are read here, and those that do not affect a merge.
READ = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "peft_type", "base_model_name_or_path",
    "revision",
)  # fmt: skip
WITHOUT_EFFECT = (
    "task_type", "peft_version", "auto_mapping", "inference_mode", "lora_dropout", "megatron_config",
    "megatron_core", "runtime_config", "qalora_group_size", "eva_config", "lora_ga_config",
    "ensure_weight_tying",
)  # fmt: skip
MERGE = "merge the adapter with peft"  # the remedy for what is not implemented here


def base_model(directory: Path) -> tuple[str | None, str | None]:
    """The name and the revision of the base model, each None if the configuration does not give it."""
    config = read_json(directory / CONFIG)

    def text(field: str) -> str | None:
        value = config.get(field)
        return value if isinstance(value, str) and value else None

    return text("base_model_name_or_path"), text("revision")


def read_config(directory: Path) -> dict:
    """adapter_config.json of an adapter that can be merged. Raises PaliGemmaError if it cannot be merged."""
    folders.check_adapter(directory)
    file = directory / CONFIG
    config = read_json(file)
    if "fine_tune_type" in config and "peft_type" not in config:
        raise PaliGemmaError(
            f"{directory} holds an adapter of MLX, which is not supported: "
            "fuse it with its model with mlx_vlm, or train one with peft"
        )
    if config.get("peft_type") != "LORA":
        kind = shown(config.get("peft_type"))
        raise PaliGemmaError(f"{file}: peft_type is {kind}; only 'LORA' is implemented")
    for name, values in SWITCHED_OFF.items():
        if config.get(name) is not None and config[name] not in values:
            raise PaliGemmaError(
                f"{file}: {name} is {shown(config[name])}, which is not implemented: {MERGE}"
            )
    if type(config.get("use_rslora", False)) is not bool:
        raise PaliGemmaError(f"{file}: use_rslora is {shown(config['use_rslora'])}; it must be true or false")
    initial = config.get("init_lora_weights", True)
    if str(initial).lower() == "gaussian":  # peft accepts this word in any case
        initial = "gaussian"
    if initial is not None and initial not in INITIALISATIONS:
        changes = f"init_lora_weights is {shown(initial)}, which changes the base model as well"
        raise PaliGemmaError(f"{file}: {changes}: convert the adapter with peft")
    known = {*SWITCHED_OFF, *READ, *WITHOUT_EFFECT}
    unknown = [x for x, value in config.items() if x not in known and value not in (None, False, [], {}, "")]
    if unknown:
        names = listed([shown(name) for name in unknown])
        tell(f"{file} has {names}, which peft 0.21 does not have: ignored")
    _check_targets(Fields(CONFIG, "", config))
    if not os.path.lexists(directory / WEIGHTS):
        pickle = "; adapter_model.bin is a pickle, which is never opened: save it again with peft"
        has_pickle = os.path.lexists(directory / "adapter_model.bin")
        raise PaliGemmaError(f"{directory} has no {WEIGHTS}{pickle if has_pickle else ''}")
    return config


def _check_targets(f: Fields) -> None:
    """Raise PaliGemmaError for values that peft refuses in the fields that select modules."""
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = f.values.get(name)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(x, str) for x in names):
            raise f.wrong(name, value, "a string, a list of strings or null")
    layers = f.values.get("layers_to_transform")
    indices = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(i) is int and i >= 0 for i in indices):
        raise f.wrong("layers_to_transform", layers, "the index of a layer, a list of these or null")
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(f.values.get("target_modules"), str) and f.values.get(name) is not None:
            raise f.wrong(name, f.values[name], "null, as target_modules is an expression and not a list")
    if f.values.get("layers_pattern") and layers is None:
        raise f.wrong("layers_pattern", f.values["layers_pattern"], "null, as layers_to_transform is")


def is_target(config: dict, module: str) -> bool:
    """Whether the configuration adapts the module, as in peft's check_target_module_exists. If target_modules
    is absent, "all-linear" or an expression that could take too long to match, it adapts every module."""

    def found(field: str, otherwise: bool) -> bool:
        names = config.get(field)
        if names is None or names == "all-linear" or (isinstance(names, str) and is_slow(names)):
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
        _check_speed(pattern, "layers_pattern")
        if index := _match(rf"(?:.*?\.)?(?:{pattern})\.(?P<index>\d+)\..*", module, "layers_pattern"):
            return int(index["index"]) in (layers if isinstance(layers, list) else [layers])
    return False


def rank(config: dict, module: str) -> int:
    """The rank of a module's factors according to the configuration; peft's default is 8."""
    f, name = _field_of(config, module, "rank_pattern", "r")
    return f.integer(name, 8)


def alpha(config: dict, module: str) -> float:
    """The alpha of a module according to the configuration; peft's default is 8."""
    f, name = _field_of(config, module, "alpha_pattern", "lora_alpha")
    return f.number(name, 8, least=-1e6, most=1e6)


def _field_of(config: dict, module: str, patterns: str, otherwise: str) -> tuple[Fields, str]:
    """The field that holds a module's value: the first of the patterns that matches the end of the module's
    name, or else the field `otherwise`."""
    f = Fields(CONFIG, "", config)
    by_pattern = config.get(patterns) or {}
    if not isinstance(by_pattern, dict):
        raise f.wrong(patterns, by_pattern, "an object")
    for pattern in by_pattern:
        _check_speed(pattern, patterns)
        if _match(rf"(.*\.)?({pattern})", module, patterns):
            return Fields(CONFIG, f"{patterns}.", by_pattern), pattern
    return f, otherwise


def is_slow(pattern: str) -> bool:
    """Whether a regular expression could take too long to match."""
    return len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+?{]", pattern) is not None


def _check_speed(pattern: str, field: str) -> None:
    if is_slow(pattern):
        long = "which could take too long to match"
        raise PaliGemmaError(f"{CONFIG}: {field} has {shown(pattern)}, {long}: {MERGE}")


def _match(pattern: str, module: str, field: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, module)
    except (re.error, OverflowError, RecursionError) as error:
        why = f"which is not a regular expression ({shown(str(error))})"
        raise PaliGemmaError(f"{CONFIG}: {field} has {shown(pattern)}, {why}") from None
