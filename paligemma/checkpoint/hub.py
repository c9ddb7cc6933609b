"""Turns the name of a model or an adapter into a directory. If it is a hub id, only the files that are needed
and that the cache lacks are downloaded."""

import os
from pathlib import Path

from .. import demo, tokenizer
from ..command import tell
from ..config import IMAGE_SETTINGS, PaliGemmaConfig
from ..errors import PaliGemmaError
from ..files import check_entered, read_json
from . import adapter_config, folders
from .quantized import file_name
from .repository import Repository
from .safetensors_file import weight_file_names

SIDE_FILES = ["config.json", "generation_config.json", *IMAGE_SETTINGS, *tokenizer.FILES]
SIDE_FILES += [folders.INDEX, folders.ADAPTER_CONFIG]


def resolve(
    model: str | Path,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """`model` itself if it is a directory or an .npz file, else the snapshot of that hub id, downloaded if
    necessary. "demo" is this package's small model, unless a directory of that name holds a checkpoint.

    Google publishes PaliGemma 1 in float32, with 16-bit weights in the revisions "bfloat16" and "float16". If
    `revision` is None, the one for `dtype` is preferred. Raises PaliGemmaError with the remedy."""
    if str(model) == "":
        raise PaliGemmaError(f"the model is an empty string: give a directory or {folders.EXAMPLE}")
    path = demo.CHECKPOINT if is_demo(model) else Path(os.path.expanduser(model))
    check_entered(path)
    if os.path.lexists(path):  # `load` says what it is if it is not a checkpoint
        if revision is not None:
            kind = "directory" if os.path.isdir(path) else "file"
            raise PaliGemmaError(f"{model} is a {kind}, which has no revision {revision!r}")
        return path
    if path.suffix == ".npz":
        raise PaliGemmaError(f"{model} is not a file: give the path of the .npz file")
    if not _is_hub_id(str(model)):
        raise PaliGemmaError(f"{model} is neither a directory nor {folders.EXAMPLE}")

    from huggingface_hub.errors import RevisionNotFoundError

    repo = Repository(str(model), token, cache_dir, local_files_only)
    if revision is None:
        directory = repo.fetch(SIDE_FILES, "main")
        folders.check_model(directory, shown=str(model), listing=lambda: repo.files("main"))
        config = PaliGemmaConfig.load(directory)
        if dtype in ("bfloat16", "float16") and config.torch_dtype == "float32" and not config.saved:
            try:
                directory, revision = repo.fetch(SIDE_FILES, dtype), dtype
            except RevisionNotFoundError:  # the repository of a fine-tuned model usually has only "main"
                pass
            except PaliGemmaError:
                if not repo.obstacle:
                    raise
        revision = revision or "main"
    else:
        try:
            directory = repo.fetch(SIDE_FILES, revision)
        except RevisionNotFoundError:
            see = f"see https://huggingface.co/{model}/tree/main"
            raise PaliGemmaError(f"{model} has no revision {revision!r}: {see}") from None
    folders.check_model(directory, shown=str(model), listing=lambda: repo.files(revision))
    config = PaliGemmaConfig.load(directory)  # refuses what cannot be run, before gigabytes are fetched
    if config.saved:
        files = file_name(config.saved.format, "?????", "?????")
        return repo.fetch([files, *_tokenizer_json(directory)], revision)
    index = directory / folders.INDEX
    wanted = weight_file_names(read_json(index)) if os.path.lexists(index) else [folders.SINGLE]
    directory = repo.fetch([*wanted, *_tokenizer_json(directory)], revision)
    if not os.path.lexists(index) and not os.path.lexists(directory / folders.SINGLE):
        directory = repo.fetch(["model-?????-of-?????.safetensors"], revision)
        if not folders.shards(path.name for path in directory.iterdir())[0]:
            raise folders.without_weights(directory, repo.files(revision) or None, shown=str(model))
    return directory


def _tokenizer_json(directory: Path) -> list[str]:
    """tokenizer.json (17 MB or more), if no other file has the pieces or the added tokens; else nothing."""
    needed = not os.path.lexists(directory / tokenizer.MODEL) or tokenizer.needs_json(directory)
    return [tokenizer.JSON] if needed else []


def is_demo(model: str | Path) -> bool:
    """Whether `model` names the small model of this package."""
    path = Path(os.path.expanduser(model))
    return path == demo.CHECKPOINT or (str(model) == demo.NAME and not os.path.exists(path / "config.json"))


def resolve_adapter(
    adapter: str | Path,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """`adapter` itself if it is a directory, else the snapshot of that hub id. Raises PaliGemmaError."""
    if str(adapter) == "":
        raise PaliGemmaError("the adapter is an empty string: give a directory or a hub id")
    path = Path(os.path.expanduser(adapter))
    check_entered(path)
    if not os.path.lexists(path):
        if not _is_hub_id(str(adapter)):
            raise PaliGemmaError(f"the adapter {adapter} is neither a directory nor a hub id")
        repo = Repository(str(adapter), token, cache_dir, local_files_only)
        path = repo.fetch([folders.ADAPTER_CONFIG, *IMAGE_SETTINGS, *tokenizer.FILES], "main")
        folders.check_adapter(path, shown=str(adapter), listing=lambda: repo.files("main"))
        path = repo.fetch([folders.ADAPTER_WEIGHTS, *_tokenizer_json(path)], "main")
    adapter_config.read_config(
        path
    )  # refuses an adapter that cannot be merged, before a model is fetched for it
    return path


def base_model(adapter: Path | None, revision: str | None = None) -> tuple[str, str | None]:
    """The name of a resolved adapter's base model, and its revision: `revision`, or else the one that the
    adapter gives. Raises PaliGemmaError if the adapter does not name its base model."""
    if adapter is None:
        raise PaliGemmaError("no model: give a hub id, a directory, or an adapter that names its base model")
    name, trained_on = adapter_config.base_model(adapter)
    if name is None:
        remedy = "give the model that the adapter was trained on with --model"
        raise PaliGemmaError(f"{adapter / folders.ADAPTER_CONFIG} has no base_model_name_or_path: {remedy}")
    if os.path.lexists(os.path.expanduser(name)):
        return name, revision
    if not _is_hub_id(name):
        missing = "which is not here: give that model with --model"
        raise PaliGemmaError(f"the adapter {adapter} was trained on {name}, {missing}")
    return name, revision or trained_on


def check_base(model: str | Path, adapter: Path) -> None:
    """Write one line to stderr if a resolved adapter was trained on a model of another name."""
    name, _ = adapter_config.base_model(adapter)
    given = os.path.abspath(os.path.expanduser(model))
    if name is None or name == str(model) or os.path.abspath(os.path.expanduser(name)) == given:
        return
    same = name.rstrip("/").split("/")[-1]
    if same == os.path.basename(given) or f"models--{name.replace('/', '--')}" in Path(given).parts:
        return  # the name says that it is a copy of the base model
    tell(f"the adapter {adapter} was trained on {name}; it is merged into {model}")


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.startswith(".")
