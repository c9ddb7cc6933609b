"""Explains what a folder is that someone gives as a model or as an adapter. No torch, no NumPy.

Many programs leave folders that look like a checkpoint but are something else. Every loader asks here first,
so that the error is one line that says what the folder is and what to do, and not a list of tensors.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from ..errors import PaliGemmaError
from ..files import check_entered, peek, read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
NEAR = re.compile(
    r"[^/]+(/[^/]+)?|(hub/)?(models--[^/]+/)?snapshots/[^/]+"
)  # a run and its checkpoint, or a part of a cache
LISTED = 4000  # files below a folder that are looked at, at most
DEPTH = 5  # levels, the files' own included: in HF_HOME they are hub/models--org--name/snapshots/commit/file

# Files that are not weights in safetensors, by their names: what they are and the remedy. {file} is the
# file's name, {give} how to give it alone.
OTHER_FILES = {
    r".*\.npz": "{file}, a file in Google's format: {give}",
    r".*\.gguf": "{file}, a GGUF file of llama.cpp, which is not read: use the safetensors checkpoint that it was made from",
    r"ggml.*\.bin": "{file}, a GGML file of llama.cpp, which is not read: use the safetensors checkpoint that it was made from",
    r"(.*/)?openvino_.*\.(bin|xml)": "{file}, a model for OpenVINO: use the safetensors checkpoint that it was made from",
    r"model\.\w+\.safetensors": "{file}, weights whose name has a variant: if they are the ones that you want, rename the file to model.safetensors",
    r"model\.[\w-]+-\d{5}-of-\d{5}\.safetensors": "{file}, weights whose names have a variant: use the revision or the repository that has them without one",
    r"consolidated.*\.safetensors": "{file}, whose tensors have another library's names: convert it with that library's script for transformers",
    r"(pytorch_model|model|consolidated|mp_rank).*\.(bin|pt|pth|ckpt)": "{file}, a pickle, which is never opened: convert it to safetensors",
    r"(.*/)?.*\.distcp|(.*/)?global_step\d+/.*": "the shards of a distributed training ({file}): have the trainer save a whole model in safetensors",
    r"(.*/)?.*\.(h5|msgpack|onnx|tflite)": "{file}, a file of another framework: use the safetensors checkpoint that it was made from",
    r"trainer_state\.json|(training_args|optimizer|scheduler)\.(bin|pt)|(rng_state|random_states).*\.(pth|pkl)": (
        "the state of a training ({file}) and no weights: give the folder with the weights"
    ),
    r".*\.(bin|pt|pth|ckpt)": "{file}, a pickle, which is never opened: convert it to safetensors",
}
# model_type, LeRobot's type or Keras Hub's class_name of models that are taken for a PaliGemma.
OTHER_MODELS = {
    "colpali": "ColPali, which makes embeddings of pages and no text",
    "pi0": "a pi0, a robot's policy on top of a PaliGemma",
    "pi05": "a pi0.5, a robot's policy on top of a PaliGemma",
    "pi0_fast": "a pi0-FAST, a robot's policy on top of a PaliGemma",
    **dict.fromkeys(
        ("PaliGemmaBackbone", "PaliGemmaCausalLM"),
        "a PaliGemma of Keras Hub: use the checkpoint for transformers",
    ),
    "siglip": "SigLIP, an image and a text encoder without a language model",
    "siglip_vision_model": "SigLIP's vision tower without a language model",
    "gemma": "Gemma, which takes text alone",
    "gemma2": "Gemma 2, which takes text alone",
    "gemma3": "Gemma 3, which is another architecture",
    "gemma3_text": "Gemma 3, which is another architecture",
    "shieldgemma2": "ShieldGemma 2, which is a Gemma 3",
}
QUANTIZED = "quantised weights ({}): use the float checkpoint that they were made from, with --quantize int8 if memory is short"
# Tensor names that tell where weights come from.
MARKS = {
    r"\.base_layer\.|\.lora_[A-Za-z_]*\.|\.modules_to_save\.": (
        "a model with an adapter that is not merged into it: call merge_and_unload() of peft and save the result, or give the base and the adapter"
    ),
    r"^(vlm\.)?(model\.)?(custom_text_proj|embedding_proj_layer)\.": OTHER_MODELS["colpali"],
    r"paligemma_with_expert\.|gemma_expert\.|(^|\.)action_(in|out)_proj\.": OTHER_MODELS["pi0"],
    r"\.(absmax|quant_map|nested_absmax|SCB|weight_format|quant_state\..*)$": QUANTIZED.format(
        "bitsandbytes"
    ),
    r"\.(qweight|qzeros|g_idx)$": QUANTIZED.format("GPTQ or AWQ"),
    r"\.biases$": QUANTIZED.format("MLX"),
    r"\.(weight_packed|weight_scale(_inv)?|input_scale|weight_zero_point|W_q|_weight_qdata)$": QUANTIZED.format(
        "float8, compressed-tensors or the like"
    ),
    r"^(model\.)?(_orig_mod|module|_fsdp_wrapped_module)\.": "a model saved from inside torch.compile or a parallel wrapper: save the model that is wrapped",
    r"^(text_model|vision_model)\.|^logit_scale$": OTHER_MODELS["siglip"],
    r"multi_modal_projector\.mm_": OTHER_MODELS["gemma3"],
}


def check_model(
    path: Path, *, shown: str = "", listing: Callable[[], Iterable[str]] | None = None, alone: bool = False
) -> dict:
    """The config.json of a checkpoint's folder; {} for an .npz file. Raises PaliGemmaError for anything else.

    shown: the name of a hub repository; `path` then has only its small files, and `listing` returns the names
    of all its files. alone: whether the model is given without an adapter."""
    shown = shown or str(path)
    if path.is_symlink() and not os.path.exists(path):
        raise PaliGemmaError(
            f"{path} is a link to {os.readlink(path)}, which is not there: download it again"
        )
    if not os.path.isdir(path) and not listing:
        if path.suffix != ".npz":
            raise PaliGemmaError(_of_file(path))
        return {}
    config = peek(path / "config.json")
    adapter = os.path.lexists(path / ADAPTER_CONFIG) or os.path.lexists(path / ADAPTER_WEIGHTS)
    if not adapter and config.get("model_type") == "paligemma":
        return config
    files = list(listing() if listing else ()) or list(_below(path))
    weights = any(file in (SINGLE, INDEX) or SHARD.fullmatch(file) for file in files)
    if adapter and not weights:
        base = peek(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
        if str(base) == shown or os.path.abspath(str(base)) == os.path.abspath(
            path
        ):  # the call that was just made
            base = "BASE"
        raise PaliGemmaError(
            f"{shown} holds an adapter and no model: give the model that it was trained on as well: --model {base} --adapter {shown}"
        )
    if adapter and alone:
        both = f"{shown} holds a model and an adapter: give --model {shown} --adapter {shown} to merge them"
        raise PaliGemmaError(f"{both}, or delete {ADAPTER_CONFIG} if they are merged already")
    if not os.path.lexists(path / "config.json"):
        raise PaliGemmaError(
            _without_config(path, shown, files, "a checkpoint", "config.json", bool(listing))
        )
    key = next((key for key in ("model_type", "type") if key in config), "class_name")
    kind = config.get(key)
    if isinstance(kind, str) and (name := OTHER_MODELS.get(kind)):
        raise PaliGemmaError(
            f"{shown} is not a PaliGemma checkpoint: its config.json has {key} {kind!r}: it holds {name}"
        )
    return config or read_json(path / "config.json")  # which says why it cannot be read


def check_adapter(path: Path, *, shown: str = "", listing: Callable[[], Iterable[str]] | None = None) -> None:
    """Raise PaliGemmaError if `path` is not an adapter's folder. The arguments are those of `check_model`."""
    shown = shown or str(path)
    check_entered(path)
    if path.is_symlink() and not os.path.exists(path):
        raise PaliGemmaError(
            f"the adapter {path} is a link to {os.readlink(path)}, which is not there: download it again"
        )
    if not os.path.isdir(path) and not listing:
        raise PaliGemmaError(f"the adapter {_of_file(path)}")
    if os.path.lexists(path / ADAPTER_CONFIG):
        return
    files = list(listing() if listing else ()) or list(_below(path))
    if peek(path / "config.json").get("model_type") == "paligemma" or SINGLE in files or INDEX in files:
        raise PaliGemmaError(
            f"{shown} has no {ADAPTER_CONFIG}: it is not the directory of an adapter but that of a model: give it with --model"
        )
    raise PaliGemmaError(_without_config(path, shown, files, "an adapter", ADAPTER_CONFIG, bool(listing)))


def without_weights(path: Path, files: Iterable[str] | None = None, *, shown: str = "") -> PaliGemmaError:
    """The error for a folder that has a config.json but no supported weights; it says what the folder
    holds."""
    remote = files is not None
    files, shown = sorted(_below(path, 2) if files is None else files), shown or str(path)
    says = f"{shown} has no {SINGLE} and no {INDEX}"
    if not remote and any((path / ".cache/huggingface/download").glob("*.incomplete")):
        return PaliGemmaError(f"{says}: its download was interrupted: run the same hf download again")
    if count := shards(files)[1]:
        return PaliGemmaError(
            f"{says}, and of its {count} shards only {len(shards(files)[0])}: download it again"
        )
    held = _other_files(path, files, shown if remote else "")
    return PaliGemmaError(f"{says}; it holds {held}" if held else says)


def shards(files: Iterable[str]) -> tuple[list[str], int]:
    """The shards among the files, in order, and their number according to the names; 0 if the names
    disagree."""
    found = [match for name in sorted(files) if (match := SHARD.fullmatch(name))]
    counts = {int(match[2]) for match in found if 1 <= int(match[1]) <= int(match[2])}
    return [match[0] for match in found], counts.pop() if len(counts) == 1 else 0


def foreign(tensors: Collection[str]) -> str | None:
    """What weights other than a PaliGemma's are, judging by the names of their tensors; None if unknown."""
    for pattern, what in MARKS.items():
        if found := next((name for name in tensors if re.search(pattern, name)), None):
            return f"{what} (it has the tensor {found!r})"
    if not any("language_model" in name for name in tensors) and any(
        "model.layers." in name for name in tensors
    ):
        return "a language model alone, without a vision tower"
    return None


def _below(path: Path, depth: int = DEPTH) -> Iterator[str]:
    """The relative names of the files in a folder, then of up to LISTED files in its subfolders, upper levels
    first. Names that begin with a dot are skipped."""

    def level(folders: list[str]) -> Iterator[os.DirEntry]:
        for folder in folders:
            try:
                entries = sorted(os.scandir(path / folder), key=lambda entry: entry.name)
            except OSError:
                continue
            yield from (entry for entry in entries if not entry.name.startswith("."))

    folders, looked_at = [""], 0
    for left in reversed(range(depth)):
        below = []
        for entry in level(folders):
            name = os.path.relpath(entry.path, path)
            if left and _is_folder(entry):
                below.append(name)
            else:
                yield name
            looked_at += 1
            if looked_at > LISTED and left < depth - 1:
                return
        folders = below


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _of_file(path: Path) -> str:
    """A message that says what a file is that was given instead of a folder."""
    folder, name = path.parent, path.name
    if name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        return f"{path} is a file of an adapter: give its folder, --adapter {folder}"
    if path.suffix in (".safetensors", ".json") or name == "tokenizer.model":
        return f"{path} is a file of a checkpoint: give its folder, {folder}"
    held = _other_files(folder, [name])
    return (
        f"{path} is not a folder: it is {held}"
        if held
        else f"{path} is neither a directory nor a hub id such as google/paligemma-3b-mix-224"
    )


def _other_files(path: Path, files: Iterable[str], repository: str = "") -> str | None:
    """What a folder or a hub repository holds instead of weights, according to its file names."""
    for pattern, what in OTHER_FILES.items():
        if found := next(
            (file for file in sorted(files) if re.fullmatch(pattern.replace(".*", "[^/]*"), file)), None
        ):
            fetch = f"run 'hf download {repository} {found}' and give the path that it prints"
            return what.format(
                file=found, give=fetch if repository else f"give that file itself, {path / found}"
            )
    return None


def _without_config(path: Path, shown: str, files: list[str], wanted: str, config: str, remote: bool) -> str:
    """The error for a folder without the file `config`, if a checkpoint or an adapter is wanted."""
    says = f"{shown} has no {config}: it is not the directory of {wanted}"
    below = _folders_with(config, files)
    if wanted == "a checkpoint" and not remote:
        below = [folder for folder in below if peek(path / folder / config).get("model_type") == "paligemma"]
    if not below and wanted == "a checkpoint":
        below = _folders_with(ADAPTER_CONFIG, files)
        if below:
            says = f"{says}, but has the folder of an adapter in it"
    if below:
        give = f"download the repository and give {below[-1]} of it" if remote else f"give {path / below[-1]}"
        more = f" (or one of {len(below) - 1} others beside it)" if len(below) > 1 else ""
        return f"{says}: {give}{more}"
    held = _other_files(
        path, [file for file in files if "/" not in file], shown if remote else ""
    )  # the folders below are not described
    return f"{says}; it holds {held}" if held else says


def _folders_with(name: str, files: Iterable[str]) -> list[str]:
    """The folders that the user may have meant (see NEAR) and that have a file of this name."""
    folders = {file.rsplit("/", 1)[0] for file in files if file.endswith(f"/{name}")}
    return sorted((folder for folder in folders if NEAR.fullmatch(folder)), key=_numbers)


def _numbers(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers by value: checkpoint-1000 comes after checkpoint-500."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
