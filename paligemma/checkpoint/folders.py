"""Checks a folder that is given as a model or as an adapter. No torch, no NumPy.

Many programs leave folders that look like a checkpoint but are something else (lookalikes.py). Every loader
checks here first, so that the error is one line that says what the folder is and what to do, and not a list
of tensors.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import PaliGemmaError
from ..files import check_entered, peek, read_json
from ..quantization import Saved, read
from .lookalikes import MODELS, other_files

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXAMPLE = "a hub id such as google/paligemma-3b-mix-224"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# Folders below the given one that the user may have meant: a run and its checkpoint, or a part of a cache.
NEAR = re.compile(r"[^/]+(/[^/]+)?|(hub/)?(models--[^/]+/)?snapshots/[^/]+")
LISTED = 4000  # the most files in subfolders that are listed
DEPTH = 5  # levels of a listing: hub/models--org--name/snapshots/commit/file in HF_HOME
Listing = Callable[[], Iterable[str]]


def check_model(path: Path, *, shown: str = "", listing: Listing | None = None, alone: bool = False) -> dict:
    """The config.json of a checkpoint's folder; {} for an .npz file. Raises PaliGemmaError for anything else.

    shown: the name of a hub repository; `path` then has only its small files, and `listing` returns the names
    of all its files. alone: whether the model is given without an adapter."""
    shown = shown or str(path)
    _check_link(path, "")
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
        base = str(peek(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE")
        if base == shown or os.path.abspath(base) == os.path.abspath(path):  # an adapter that names itself
            base = "BASE"
        both = f"give the model that it was trained on as well: --model {base} --adapter {shown}"
        raise PaliGemmaError(f"{shown} holds an adapter and no model: {both}")
    if adapter and alone:
        both = f"{shown} holds a model and an adapter: give --model {shown} --adapter {shown} to merge them"
        raise PaliGemmaError(f"{both}, or delete {ADAPTER_CONFIG} if they are merged already")
    if not os.path.lexists(path / "config.json"):
        raise _without_config(path, shown, files, "a checkpoint", "config.json", bool(listing))
    key = next((key for key in ("model_type", "type") if key in config), "class_name")
    kind = config.get(key)
    if isinstance(kind, str) and (name := MODELS.get(kind)):
        holds = f"its config.json has {key} {kind!r}: it holds {name}"
        raise PaliGemmaError(f"{shown} is not a PaliGemma checkpoint: {holds}")
    return config or read_json(path / "config.json")  # raises an error that says why it cannot be read


def saved(path: Path) -> Saved | None:
    """What config.json says of the quantised weights that a folder holds; None for float weights, and for
    anything else than a PaliGemma checkpoint's folder. Raises PaliGemmaError if it says something wrong."""
    config = peek(path / "config.json") if os.path.lexists(path / "config.json") else {}
    if config.get("model_type") != "paligemma":
        return None
    found = read(config.get("quantization_config"))
    return found if isinstance(found, Saved) else None


def check_adapter(path: Path, *, shown: str = "", listing: Listing | None = None) -> None:
    """Raise PaliGemmaError if `path` is not an adapter's folder. The arguments are those of `check_model`."""
    shown = shown or str(path)
    check_entered(path)
    _check_link(path, "the adapter ")
    if not os.path.isdir(path) and not listing:
        raise PaliGemmaError(f"the adapter {_of_file(path)}")
    if os.path.lexists(path / ADAPTER_CONFIG):
        return
    files = list(listing() if listing else ()) or list(_below(path))
    if peek(path / "config.json").get("model_type") == "paligemma" or SINGLE in files or INDEX in files:
        model = "it is not the directory of an adapter but that of a model: give it with --model"
        raise PaliGemmaError(f"{shown} has no {ADAPTER_CONFIG}: {model}")
    raise _without_config(path, shown, files, "an adapter", ADAPTER_CONFIG, bool(listing))


def without_weights(path: Path, files: Iterable[str] | None = None, *, shown: str = "") -> PaliGemmaError:
    """The error for a folder with a config.json but no supported weights; it says what the folder holds."""
    remote = files is not None
    files, shown = sorted(_below(path, 2) if files is None else files), shown or str(path)
    says = f"{shown} has no {SINGLE} and no {INDEX}"
    if not remote and any((path / ".cache/huggingface/download").glob("*.incomplete")):
        return PaliGemmaError(f"{says}: its download was interrupted: run the same hf download again")
    found, count = shards(files)
    if count:
        return PaliGemmaError(f"{says}, and only {len(found)} of its {count} shards: download it again")
    held = other_files(path, files, shown if remote else "")
    return PaliGemmaError(f"{says}; it holds {held}" if held else says)


def shards(files: Iterable[str]) -> tuple[list[str], int]:
    """The shards among the files, in order, and their number according to the names; 0 if these disagree."""
    found = [match for name in sorted(files) if (match := SHARD.fullmatch(name))]
    counts = {int(match[2]) for match in found if 1 <= int(match[1]) <= int(match[2])}
    return [match[0] for match in found], counts.pop() if len(counts) == 1 else 0


def _check_link(path: Path, what: str) -> None:
    """Raise PaliGemmaError for a link whose target does not exist."""
    if path.is_symlink() and not os.path.exists(path):
        target = f"{os.readlink(path)}, which does not exist: download it again"
        raise PaliGemmaError(f"{what}{path} is a link to {target}")


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

    folders, seen = [""], 0
    for left in reversed(range(depth)):
        below = []
        for entry in level(folders):
            name = os.path.relpath(entry.path, path)
            if left and _is_folder(entry):
                below.append(name)
            else:
                yield name
            seen += 1
            if seen > LISTED and left < depth - 1:
                return
        folders = below


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _of_file(path: Path) -> str:
    """A message about a file that was given instead of a folder."""
    folder, name = path.parent, path.name
    if name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        return f"{path} is a file of an adapter: give its folder, --adapter {folder}"
    if path.suffix in (".safetensors", ".json") or name == "tokenizer.model":
        return f"{path} is a file of a checkpoint: give its folder, {folder}"
    if kind := other_files(folder, [name]):
        return f"{path} is not a folder: it is {kind}"
    return f"{path} is neither a directory nor {EXAMPLE}"


def _without_config(
    path: Path, shown: str, files: list[str], wanted: str, config: str, remote: bool
) -> PaliGemmaError:
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
        return PaliGemmaError(f"{says}: {give}{more}")
    here = [file for file in files if "/" not in file]  # files of subfolders are not described
    held = other_files(path, here, shown if remote else "")
    return PaliGemmaError(f"{says}; it holds {held}" if held else says)


def _folders_with(name: str, files: Iterable[str]) -> list[str]:
    """The folders that the user may have meant (see NEAR) and that have a file of this name."""
    folders = {file.rsplit("/", 1)[0] for file in files if file.endswith(f"/{name}")}
    return sorted((folder for folder in folders if NEAR.fullmatch(folder)), key=_numbers)


def _numbers(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers by value: checkpoint-1000 comes after checkpoint-500."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
