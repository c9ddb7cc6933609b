"""From a hub id to a directory: the files that are needed and no others, from the cache where they are there."""

import errno
import re
import shutil
import sys
from pathlib import Path

from .checkpoint import weight_file_names
from .config import PaliGemmaConfig, read_json
from .errors import PaliGemmaError

SIDE_FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.model", "model.safetensors.index.json"]


def resolve(
    model: str | Path,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of `model`: itself when it is one, else the snapshot of that hub id, downloaded where it must be.

    Google publishes PaliGemma 1 in float32, with the half-size weights in the revisions "bfloat16" and "float16": where
    no revision was asked for, the one for `dtype` is preferred. Raises PaliGemmaError with the remedy in it."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise PaliGemmaError(f"{model} is a directory, which has no revision {revision!r}")
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("."):
        raise PaliGemmaError(f"{model} is neither a directory nor a hub id such as google/paligemma-3b-mix-224")

    from huggingface_hub.errors import RevisionNotFoundError

    repo = _Repo(str(model), token, cache_dir, local_files_only)
    if revision is None:
        directory = repo.fetch(SIDE_FILES, "main")
        if dtype in ("bfloat16", "float16") and PaliGemmaConfig.load(directory).torch_dtype == "float32":
            try:
                directory, revision = repo.fetch(SIDE_FILES, dtype), dtype
            except RevisionNotFoundError:  # the repository of a fine-tune, say, has one revision
                pass
            except PaliGemmaError:
                if not repo.offline:
                    raise
        revision = revision or "main"
    else:
        try:
            directory = repo.fetch(SIDE_FILES, revision)
        except RevisionNotFoundError:
            raise PaliGemmaError(f"{model} has no revision {revision!r}: see https://huggingface.co/{model}/tree/main") from None
    PaliGemmaConfig.load(directory)  # refuses what cannot be run before gigabytes of it are fetched
    index = directory / "model.safetensors.index.json"
    wanted = weight_file_names(read_json(index)) if index.exists() else ["model.safetensors"]
    if not (directory / "tokenizer.model").exists():
        wanted.append("tokenizer.json")
    return repo.fetch(wanted, revision)


class _Repo:
    def __init__(self, name: str, token: str | None, cache_dir: str | Path | None, local_files_only: bool):
        from huggingface_hub import constants

        self.name, self.token = name, token
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.offline = local_files_only or constants.HF_HUB_OFFLINE

    def fetch(self, files: list[str], revision: str) -> Path:
        """The snapshot directory with these files in it, as far as the repository has them."""
        from huggingface_hub import errors, snapshot_download

        page = f"https://huggingface.co/{self.name}"
        try:
            if not self.offline:
                self._check_space(files, revision)
            directory = snapshot_download(
                self.name, revision=revision, cache_dir=self.cache_dir, token=self.token, local_files_only=self.offline, allow_patterns=files
            )
            return Path(directory)
        except errors.RevisionNotFoundError:
            raise
        except errors.GatedRepoError:
            raise PaliGemmaError(f"{self.name} is gated: accept its licence at {page}, then run 'hf auth login' or set HF_TOKEN") from None
        except errors.RepositoryNotFoundError:
            raise PaliGemmaError(f"{self.name} is not on the hub, or is private: check the name; for a private one run 'hf auth login' or set HF_TOKEN") from None
        except errors.LocalEntryNotFoundError:
            if self.offline:
                raise PaliGemmaError(f"{self.name} ({revision}) is not whole in the cache {self.cache_dir} and downloads are switched off: run once without --local-files-only and HF_HUB_OFFLINE") from None
            raise PaliGemmaError(f"{self.name} is not in the cache and the hub cannot be reached: check the network connection, or give a local directory") from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            remedy = "check HF_TOKEN ('hf auth whoami')" if status in (401, 403) else "try again later"
            raise PaliGemmaError(f"the hub answers {status} for {self.name}: {remedy}") from None
        except (errors.HTTPError, OSError) as error:
            code = error.errno if isinstance(error, OSError) else None
            if code in (errno.ENOSPC, errno.EDQUOT):
                raise PaliGemmaError(f"the disk of {self.cache_dir} is full: free some space, or set HF_HOME to another disk") from None
            if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
                raise PaliGemmaError(f"the cache {self.cache_dir} cannot be written ({error.strerror}): set HF_HOME to a directory that can") from None
            raise PaliGemmaError(f"the download of {self.name} broke off ({error}): run the same command again, it goes on where it stopped") from None

    def _check_space(self, files: list[str], revision: str) -> None:
        from huggingface_hub import errors, snapshot_download

        try:
            plan = snapshot_download(self.name, revision=revision, cache_dir=self.cache_dir, token=self.token, allow_patterns=files, dry_run=True)
        except errors.DryRunError:  # the hub cannot be reached; the cache may do
            print(f"the hub cannot be reached for {self.name}; looking in the cache", file=sys.stderr)
            return
        needed = sum(file.file_size for file in plan if file.will_download)
        existing = next(p for p in [self.cache_dir, *self.cache_dir.absolute().parents] if p.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise PaliGemmaError(f"{self.name} needs {needed / 1e9:.1f} GB more on the disk of {self.cache_dir}, which has {free / 1e9:.1f} GB free: free some space, or set HF_HOME to another disk")
