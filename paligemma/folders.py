"""What a folder is that someone gives as a model or as an adapter, from its files' names, its small JSON files and its tensors' names.

Trainers, merges, caches, clones and converters leave folders that look like a checkpoint and are something else. Every loader asks here
first, so that the answer is one line with what the folder is and what to do, and not a list of tensors. No torch, no NumPy.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path

from .errors import PaliGemmaError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
LISTED = 4000  # files of a folder that are looked at, at most
POINTER = b"version https://git-lfs"  # how the file begins that a clone without git-lfs has in place of a large one
DEPTH = 4  # levels, the files' own included: in a cache they are models--org--name/snapshots/commit/file

# Files that are not weights in safetensors, by their names: what they are and the remedy. {file} is the file's name, {path} its whole path.
OTHER_FILES = {
    r".*\.npz": "{file}, a file in Google's format: give that file itself, {path}",
    r".*\.gguf": "{file}, a GGUF file of llama.cpp, which is not read: use the safetensors checkpoint that it was made from",
    r"consolidated.*\.safetensors": "{file}, whose tensors have another library's names: convert it with that library's script for transformers",
    r"(pytorch_model|model|consolidated|mp_rank).*\.(bin|pt|pth|ckpt)": "{file}, a pickle, which is never opened: convert it to safetensors",
    r"(.*/)?.*\.distcp|(.*/)?global_step\d+/.*": "the shards of a distributed training ({file}): have the trainer save a whole model in safetensors",
    r".*\.(h5|msgpack|onnx|tflite)": "{file}, a file of another framework: use the safetensors checkpoint that it was made from",
    r"(trainer_state\.json|(training_args|optimizer|scheduler)\.(bin|pt))": "the state of a training ({file}) and no weights: give the folder with the weights",
    r".*\.(bin|pt|pth|ckpt)": "{file}, a pickle, which is never opened: convert it to safetensors",
}
# model_type, or LeRobot's type, of models that are taken for a PaliGemma.
OTHER_MODELS = {
    "colpali": "ColPali, which makes embeddings of pages and no text",
    "pi0": "a pi0, a robot's policy on top of a PaliGemma",
    "pi05": "a pi0.5, a robot's policy on top of a PaliGemma",
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
    r"\.(absmax|quant_map|nested_absmax|SCB|weight_format|quant_state\..*)$": QUANTIZED.format("bitsandbytes"),
    r"\.(qweight|qzeros|g_idx)$": QUANTIZED.format("GPTQ or AWQ"),
    r"\.biases$": QUANTIZED.format("MLX"),
    r"\.(weight_packed|weight_scale(_inv)?|input_scale|weight_zero_point|W_q|_weight_qdata)$": QUANTIZED.format("float8, compressed-tensors or the like"),
    r"^(model\.)?(_orig_mod|module|_fsdp_wrapped_module)\.": "a model saved from inside torch.compile or a parallel wrapper: save the model that is wrapped",
    r"^(text_model|vision_model)\.|^logit_scale$": OTHER_MODELS["siglip"],
    r"multi_modal_projector\.mm_": OTHER_MODELS["gemma3"],
}


def check_model(path: Path, *, shown: str = "", listing: Callable[[], Iterable[str]] | None = None, alone: bool = False) -> None:
    """Raise PaliGemmaError with what `path` is where that is neither the folder of a checkpoint nor an .npz file. Of a hub repository, of
    which `path` has the small files only, `shown` is the name and `listing` gives the names of all files. alone: no adapter was given with it."""
    shown = shown or str(path)
    if path.is_symlink() and not path.exists():
        raise PaliGemmaError(f"{path} is a link to {os.readlink(path)}, which is not there: download it again")
    if not path.is_dir() and not listing:
        if path.suffix != ".npz":
            raise PaliGemmaError(_of_file(path))
        return
    config = peek(path / "config.json")
    adapter = _present(path / ADAPTER_CONFIG) or _present(path / ADAPTER_WEIGHTS)
    if not adapter and config.get("model_type") == "paligemma":
        return
    files = list(listing() if listing else ()) or list(_below(path))
    weights = any(file in (SINGLE, INDEX) or SHARD.fullmatch(file) for file in files)
    if adapter and not weights:
        base = peek(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
        raise PaliGemmaError(f"{shown} holds an adapter and no model: give the model that it was trained on as well: --model {base} --adapter {shown}")
    if adapter and alone:
        both = f"{shown} holds a model and an adapter: give --model {shown} --adapter {shown} to merge them"
        raise PaliGemmaError(f"{both}, or delete {ADAPTER_CONFIG} if they are merged already")
    if not _present(path / "config.json"):
        raise PaliGemmaError(_without_config(path, shown, files, "a checkpoint", "config.json", bool(listing)))
    key = "model_type" if "model_type" in config else "type"
    kind = config.get(key)
    if isinstance(kind, str) and (name := OTHER_MODELS.get(kind)):
        raise PaliGemmaError(f"{shown} is not a PaliGemma checkpoint: its config.json has {key} {kind!r}: it holds {name}")


def check_adapter(path: Path, *, shown: str = "", listing: Callable[[], Iterable[str]] | None = None) -> None:
    """Raise PaliGemmaError with what `path` is where that is not the folder of an adapter, as `check_model` does."""
    shown = shown or str(path)
    if path.is_symlink() and not path.exists():
        raise PaliGemmaError(f"the adapter {path} is a link to {os.readlink(path)}, which is not there: download it again")
    if not path.is_dir() and not listing:
        raise PaliGemmaError(f"the adapter {_of_file(path)}")
    if _present(path / ADAPTER_CONFIG):
        return
    files = list(listing() if listing else ()) or list(_below(path))
    if peek(path / "config.json").get("model_type") == "paligemma" or SINGLE in files or INDEX in files:
        raise PaliGemmaError(f"{shown} has no {ADAPTER_CONFIG}: it is not the directory of an adapter but that of a model: give it with --model")
    raise PaliGemmaError(_without_config(path, shown, files, "an adapter", ADAPTER_CONFIG, bool(listing)))


def without_weights(path: Path, files: Iterable[str] | None = None, *, shown: str = "") -> PaliGemmaError:
    """What a folder with a config.json holds in place of weights that are read."""
    files, shown = sorted(_below(path, 2) if files is None else files), shown or str(path)
    says = f"{shown} has no {SINGLE} and no {INDEX}"
    if count := shards(files)[1]:
        return PaliGemmaError(f"{says}, and of its {count} shards only {len(shards(files)[0])}: download it again")
    held = _other_files(path, files)
    return PaliGemmaError(f"{says}; it holds {held}" if held else says)


def shards(files: Iterable[str]) -> tuple[list[str], int]:
    """The shards of a model among the files, in order, and how many there should be by their names; 0 where these disagree."""
    found = [match for name in sorted(files) if (match := SHARD.fullmatch(name))]
    counts = {int(match[2]) for match in found if 1 <= int(match[1]) <= int(match[2])}
    return [match[0] for match in found], counts.pop() if len(counts) == 1 else 0


def foreign(tensors: Collection[str]) -> str | None:
    """What weights are that are not a PaliGemma's, from their tensors' names; None where these do not tell."""
    for pattern, what in MARKS.items():
        if found := next((name for name in tensors if re.search(pattern, name)), None):
            return f"{what} (it has the tensor {found!r})"
    if not any("language_model" in name for name in tensors) and any("model.layers." in name for name in tensors):
        return "a language model alone, without a vision tower"
    return None


def unreadable(file: Path, error: Exception, what: str) -> PaliGemmaError:
    """Why a file is not `what` it should be, with the remedy."""
    if file.is_symlink() and not file.exists():
        return PaliGemmaError(f"{file} is a link to {os.readlink(file)}, which is not there: download it again")
    if _forbidden(file):  # safetensors says that there is no such file
        return PaliGemmaError(f"{file} may not be read (permission denied): change its permissions")
    if is_pointer(file):
        return PaliGemmaError(f"{file} is not {what}: it is git's pointer to the file: run 'git lfs pull' in {file.parent}")
    return PaliGemmaError(f"{file} is not {what} ({error}): download it again")


def _forbidden(file: Path) -> bool:
    try:
        file.open("rb").close()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def is_pointer(file: Path) -> bool:
    """Whether the file is what a clone without git-lfs has in place of it."""
    try:
        return file.is_file() and file.stat().st_size < 1000 and file.read_bytes().startswith(POINTER)
    except OSError:
        return False


def read_bytes(path: Path, what: str = "a file") -> bytes:
    """The contents of a small file of a checkpoint. Raises PaliGemmaError, with the remedy, when it is absent or unreadable or is not `what` it should be."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise unreadable(path, error, what) from None
        raise PaliGemmaError(f"{path.parent} has no {path.name}: it is not the directory of a checkpoint") from None
    except OSError as error:
        raise unreadable(path, error, what) from None
    if data.startswith(POINTER):
        raise unreadable(path, ValueError(), what)
    return data


def read_json(path: Path) -> dict:
    """A JSON object from a file in UTF-8, UTF-16 or UTF-32. Raises PaliGemmaError, with the remedy, when it is absent, unreadable or something else."""
    data = read_bytes(path, "JSON")
    try:
        value = json.loads(data)
    except (RecursionError, ValueError) as error:
        raise PaliGemmaError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise PaliGemmaError(f"{path} does not hold a JSON object: download it again")
    return value


def peek(path: Path) -> dict:
    """A JSON object, or an empty one where there is none: whoever needs it reads it again and says what is wrong."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _present(file: Path) -> bool:
    return file.exists() or file.is_symlink()


def _below(path: Path, depth: int = DEPTH) -> Iterator[str]:
    """The names of the files in a folder and in those below it, relative to it."""

    def walk(folder: Path, prefix: str, left: int) -> Iterator[str]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            if left > 1 and entry.is_dir():
                yield from walk(folder / entry.name, f"{prefix}{entry.name}/", left - 1)
            else:
                yield prefix + entry.name

    return islice(walk(path, "", depth), LISTED)


def _of_file(path: Path) -> str:
    """What a file is that was given in place of a folder."""
    folder, name = path.parent, path.name
    if name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        return f"{path} is a file of an adapter: give its folder, --adapter {folder}"
    if path.suffix in (".safetensors", ".json") or name == "tokenizer.model":
        return f"{path} is a file of a checkpoint: give its folder, {folder}"
    held = _other_files(folder, [name])
    return f"{path} is not a folder: it is {held}" if held else f"{path} is neither a directory nor a hub id such as google/paligemma-3b-mix-224"


def _other_files(path: Path, files: Iterable[str]) -> str | None:
    for pattern, what in OTHER_FILES.items():
        if found := next((file for file in sorted(files) if re.fullmatch(pattern, file)), None):
            return what.format(file=found, path=path / found)
    return None


def _without_config(path: Path, shown: str, files: list[str], wanted: str, config: str, remote: bool) -> str:
    """What a folder without this file is, for someone who wants a checkpoint or an adapter."""
    says = f"{shown} has no {config}: it is not the directory of {wanted}"
    below = sorted({file.rsplit("/", 1)[0] for file in files if file.endswith(f"/{config}")}, key=_numbers)
    if not below and wanted == "a checkpoint":
        below = sorted({file.rsplit("/", 1)[0] for file in files if file.endswith(f"/{ADAPTER_CONFIG}")}, key=_numbers)
        if below:
            says = f"{says}, but has the folder of an adapter in it"
    if below:
        give = f"download the repository and give {below[-1]} of it" if remote else f"give {path / below[-1]}"
        more = f" (or one of {len(below) - 1} others beside it)" if len(below) > 1 else ""
        return f"{says}: {give}{more}"
    held = _other_files(path, files)
    return f"{says}; it holds {held}" if held else says


def _numbers(name: str) -> list[tuple[int, str]]:
    """checkpoint-1000 comes after checkpoint-500."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
