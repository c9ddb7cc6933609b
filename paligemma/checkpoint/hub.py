"""Turns a hub id into a directory: downloads only the files that are needed and that the cache does not
have."""

import errno
import os
import shutil
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from .. import demo, tokenizer
from ..command import STDERR, tell
from ..config import IMAGE_SETTINGS, PaliGemmaConfig
from ..errors import PaliGemmaError
from ..files import check_entered, read_json
from . import adapters, folders
from .safetensors_file import weight_file_names

SIDE_FILES = [
    "config.json",
    "generation_config.json",
    *IMAGE_SETTINGS,
    folders.INDEX,
    folders.ADAPTER_CONFIG,
    *tokenizer.FILES,
]


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
        raise PaliGemmaError(
            "the model is an empty string: give a directory or a hub id such as google/paligemma-3b-mix-224"
        )
    path = demo.CHECKPOINT if is_demo(model) else Path(os.path.expanduser(model))
    check_entered(path)
    if os.path.lexists(path):  # `load` says what it is if it is not a checkpoint
        if revision is not None:
            raise PaliGemmaError(
                f"{model} is a {'directory' if os.path.isdir(path) else 'file'}, which has no revision {revision!r}"
            )
        return path
    if path.suffix == ".npz":
        raise PaliGemmaError(f"{model} is not a file: give the path of the .npz file")
    if not _is_hub_id(str(model)):
        raise PaliGemmaError(
            f"{model} is neither a directory nor a hub id such as google/paligemma-3b-mix-224"
        )

    from huggingface_hub.errors import RevisionNotFoundError

    repo = _Repo(str(model), token, cache_dir, local_files_only)
    if revision is None:
        directory = repo.fetch(SIDE_FILES, "main")
        folders.check_model(directory, shown=str(model), listing=lambda: repo.files("main"))
        if dtype in ("bfloat16", "float16") and PaliGemmaConfig.load(directory).torch_dtype == "float32":
            try:
                directory, revision = repo.fetch(SIDE_FILES, dtype), dtype
            except RevisionNotFoundError:  # the repository of a fine-tune, say, has one revision
                pass
            except PaliGemmaError:
                if not repo.obstacle:
                    raise
        revision = revision or "main"
    else:
        try:
            directory = repo.fetch(SIDE_FILES, revision)
        except RevisionNotFoundError:
            raise PaliGemmaError(
                f"{model} has no revision {revision!r}: see https://huggingface.co/{model}/tree/main"
            ) from None
    folders.check_model(directory, shown=str(model), listing=lambda: repo.files(revision))
    PaliGemmaConfig.load(directory)  # refuses what cannot be run before gigabytes of it are fetched
    index = directory / folders.INDEX
    wanted = weight_file_names(read_json(index)) if os.path.lexists(index) else [folders.SINGLE]
    directory = repo.fetch([*wanted, *_tokenizer_json(directory)], revision)
    if not os.path.lexists(index) and not os.path.lexists(directory / folders.SINGLE):
        directory = repo.fetch(["model-?????-of-?????.safetensors"], revision)
        if not folders.shards(path.name for path in directory.iterdir())[0]:
            raise folders.without_weights(directory, repo.files(revision) or None, shown=str(model))
    return directory


def _tokenizer_json(directory: Path) -> list[str]:
    """tokenizer.json (17 MB or more), if it is the only file with the pieces or the added tokens; else
    nothing."""
    return (
        [tokenizer.JSON]
        if not os.path.lexists(directory / tokenizer.MODEL) or tokenizer.needs_json(directory)
        else []
    )


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
        repo = _Repo(str(adapter), token, cache_dir, local_files_only)
        path = repo.fetch([adapters.CONFIG, *IMAGE_SETTINGS, *tokenizer.FILES], "main")
        folders.check_adapter(path, shown=str(adapter), listing=lambda: repo.files("main"))
        path = repo.fetch([adapters.WEIGHTS, *_tokenizer_json(path)], "main")
    adapters.read_config(path)  # refuses what cannot be merged before a model is fetched for it
    return path


def base_model(adapter: Path | None, revision: str | None = None) -> tuple[str, str | None]:
    """The base model of a resolved adapter, and `revision` or else the base model's revision. Raises
    PaliGemmaError if the adapter does not name its base model."""
    if adapter is None:
        raise PaliGemmaError("no model: give a hub id, a directory, or an adapter that names its base model")
    name, trained_on = adapters.base_model(adapter)
    if name is None:
        raise PaliGemmaError(
            f"{adapter / adapters.CONFIG} has no base_model_name_or_path: give the model that the adapter was trained on with --model"
        )
    if os.path.lexists(os.path.expanduser(name)):
        return name, revision
    if not _is_hub_id(name):
        raise PaliGemmaError(
            f"the adapter {adapter} was trained on {name}, which is not here: give that model with --model"
        )
    return name, revision or trained_on


def check_base(model: str | Path, adapter: Path) -> None:
    """Write one line to stderr if a resolved adapter was trained on a model of another name."""
    name, _ = adapters.base_model(adapter)
    given = os.path.abspath(os.path.expanduser(model))
    if name is None or name == str(model) or os.path.abspath(os.path.expanduser(name)) == given:
        return
    same = name.rstrip("/").split("/")[-1]
    if same == os.path.basename(given) or f"models--{name.replace('/', '--')}" in Path(given).parts:
        return  # a copy of it, by its name
    tell(f"the adapter {adapter} was trained on {name}; it is merged into {model}")


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not name.startswith(".")


class _Repo:
    def __init__(self, name: str, token: str | None, cache_dir: str | Path | None, local_files_only: bool):
        from huggingface_hub import constants, errors

        self.name, self.token = name, token
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        switched_off = local_files_only or constants.HF_HUB_OFFLINE
        self.obstacle: BaseException | None = (
            errors.OfflineModeIsEnabled() if switched_off else None
        )  # why only the cache is looked at
        self.notice = ""

    def fetch(self, files: list[str], revision: str) -> Path:
        """The snapshot directory with those of these files that the repository has; only from the cache if
        the hub cannot be reached. Raises RevisionNotFoundError, or PaliGemmaError for any other failure."""
        from huggingface_hub import errors

        try:
            if not self.obstacle:
                self._prepare(files, revision)
            directory = self._snapshot(files, revision, local_files_only=self.obstacle is not None)
        except errors.RevisionNotFoundError:
            raise
        except errors.LocalEntryNotFoundError as error:
            raise PaliGemmaError(self._explain(self.obstacle or error.__cause__ or error)) from None
        except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]  httpx's or httpx2's
            raise PaliGemmaError(self._explain(error)) from None
        if self.notice:
            tell(self.notice)
            self.notice = ""
        return Path(directory)

    def files(self, revision: str) -> list[str]:
        """The names of all files in the repository, for messages; an empty list if the hub does not
        answer."""
        from huggingface_hub import HfApi, errors

        if self.obstacle:
            return []
        try:
            return HfApi(token=self.token).list_repo_files(self.name, revision=revision)
        except (errors.HTTPError, OSError, ValueError):  # pyright: ignore[reportPrivateImportUsage]  it is for a better message alone
            return []

    def _prepare(self, files: list[str], revision: str) -> None:
        """Check that the cache can be written, that the hub answers and that the disk has enough space."""
        from huggingface_hub import errors

        self.cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            plan = self._snapshot(files, revision, dry_run=True)
        except (
            errors.DryRunError,
            JSONDecodeError,
        ) as error:  # the latter from a network that asks for a login first
            self.obstacle = error.__cause__ or error
            status = (
                f"answers {self.obstacle.response.status_code}"
                if isinstance(self.obstacle, errors.HfHubHTTPError)
                else "cannot be reached"
            )
            self.notice = f"{self.name} is taken from the cache: the hub {status}"
            return
        needed = sum(file.file_size or 0 for file in plan if file.will_download)
        free = shutil.disk_usage(self.cache_dir).free
        if needed > free:
            sizes = f"needs {needed / 1e9:.1f} GB more on the disk of {self.cache_dir}, which has {free / 1e9:.1f} GB free"
            raise PaliGemmaError(f"{self.name} {sizes}: free some space, or set HF_HOME to another disk")

    def _snapshot(
        self, files: list[str], revision: str, *, dry_run: bool = False, local_files_only: bool = False
    ) -> Any:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class Bar(tqdm):  # where stderr is a terminal, and not for the dry run
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **{**kwargs, "disable": dry_run or None, "file": STDERR})

        return snapshot_download(
            self.name, revision=revision, cache_dir=self.cache_dir, token=self.token, local_files_only=local_files_only,
            allow_patterns=files, dry_run=dry_run, tqdm_class=Bar,
        )  # fmt: skip

    def _explain(self, error: BaseException) -> str:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return f"{self.name} is gated: accept its licence at https://huggingface.co/{self.name}, then run 'hf auth login' or set HF_TOKEN"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{self.name} is not on the hub, or is private: check the name; for a private one run 'hf auth login' or set HF_TOKEN"
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            remedy = "check HF_TOKEN ('hf auth whoami')" if status in (401, 403) else "try again later"
            return f"the hub answers {status} for {self.name}: {remedy}"
        partial = f"{self.name} is not whole in the cache {self.cache_dir}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"{partial} and downloads are switched off: run once without --local-files-only and HF_HUB_OFFLINE"
        if error is self.obstacle:
            return f"{partial} and the hub cannot be reached: check the network connection, or give a local directory"
        code, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        if code in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of {self.cache_dir} is full: free some space, or set HF_HOME to another disk"
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            return f"the cache {self.cache_dir} cannot be written ({reason}): set HF_HOME to a directory that can"
        return f"the download of {self.name} broke off ({error}): run the same command again, whole files are kept"
