"""Downloads from a repository of the Hugging Face hub into the cache; if the hub cannot be reached, the cache
alone is used."""

import errno
import shutil
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from ..command import STDERR, tell
from ..errors import PaliGemmaError


class Repository:
    """A repository, and the cache directory that its files are downloaded to."""

    def __init__(self, name: str, token: str | None, cache_dir: str | Path | None, local_files_only: bool):
        from huggingface_hub import constants, errors

        self.name, self.token = name, token
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        switched_off = local_files_only or constants.HF_HUB_OFFLINE
        # Why only the cache is used; None while the hub is asked too.
        self.obstacle: BaseException | None = errors.OfflineModeIsEnabled() if switched_off else None
        self.notice = ""  # a line for stderr once the cache has been found complete

    def fetch(self, files: list[str], revision: str) -> Path:
        """The snapshot directory, with those of the files that the repository has; only from the cache if the
        hub cannot be reached. Raises RevisionNotFoundError, or PaliGemmaError for any other failure."""
        from huggingface_hub import errors

        try:
            if not self.obstacle:
                self._prepare(files, revision)
            directory = self._snapshot(files, revision, local_files_only=self.obstacle is not None)
        except errors.RevisionNotFoundError:
            raise
        except errors.LocalEntryNotFoundError as error:
            raise PaliGemmaError(self._explain(self.obstacle or error.__cause__ or error)) from None
        except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]  of httpx
            raise PaliGemmaError(self._explain(error)) from None
        if self.notice:
            tell(self.notice)
            self.notice = ""
        return Path(directory)

    def files(self, revision: str) -> list[str]:
        """All file names in the repository, for messages; an empty list if the hub does not answer."""
        from huggingface_hub import HfApi, errors

        if self.obstacle:
            return []
        try:
            return HfApi(token=self.token).list_repo_files(self.name, revision=revision)
        except (errors.HTTPError, OSError, ValueError):  # pyright: ignore[reportPrivateImportUsage]  of httpx
            return []

    def _prepare(self, files: list[str], revision: str) -> None:
        """Check that the cache can be written, that the hub answers and that the disk has enough space."""
        from huggingface_hub import errors

        self.cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            plan = self._snapshot(files, revision, dry_run=True)
        except (errors.DryRunError, JSONDecodeError) as error:  # JSONDecodeError: a network's login page
            self.obstacle = obstacle = error.__cause__ or error
            answered = isinstance(obstacle, errors.HfHubHTTPError)
            status = f"answers {obstacle.response.status_code}" if answered else "cannot be reached"
            self.notice = f"{self.name} is taken from the cache: the hub {status}"
            return
        needed = sum(file.file_size or 0 for file in plan if file.will_download)
        free = shutil.disk_usage(self.cache_dir).free
        if needed > free:
            more = f"{needed / 1e9:.1f} GB more on the disk of {self.cache_dir}"
            few = f"which has {free / 1e9:.1f} GB free: free some space, or set HF_HOME to another disk"
            raise PaliGemmaError(f"{self.name} needs {more}, {few}")

    def _snapshot(
        self, files: list[str], revision: str, *, dry_run: bool = False, local_files_only: bool = False
    ) -> Any:
        """The snapshot directory, or for a dry run the list of what would be downloaded."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class Bar(tqdm):  # shown if stderr is a terminal, except for a dry run
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **{**kwargs, "disable": dry_run or None, "file": STDERR})

        return snapshot_download(
            self.name, revision=revision, cache_dir=self.cache_dir, token=self.token, allow_patterns=files,
            local_files_only=local_files_only, dry_run=dry_run, tqdm_class=Bar,
        )  # fmt: skip

    def _explain(self, error: BaseException) -> str:
        """What went wrong, and the remedy."""
        from huggingface_hub import errors

        log_in = "run 'hf auth login' or set HF_TOKEN"
        if isinstance(error, errors.GatedRepoError):
            licence = f"accept its licence at https://huggingface.co/{self.name}"
            return f"{self.name} is gated: {licence}, then {log_in}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{self.name} is not on the hub, or is private: check the name; for a private one {log_in}"
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            remedy = "check HF_TOKEN ('hf auth whoami')" if status in (401, 403) else "try again later"
            return f"the hub answers {status} for {self.name}: {remedy}"
        partial = f"{self.name} is not complete in the cache {self.cache_dir}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            once = "run once without --local-files-only and HF_HUB_OFFLINE"
            return f"{partial} and downloads are switched off: {once}"
        if error is self.obstacle:
            check = "check the network connection, or give a local directory"
            return f"{partial} and the hub cannot be reached: {check}"
        code, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        if code in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of {self.cache_dir} is full: free some space, or set HF_HOME to another disk"
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            remedy = "set HF_HOME to a writable directory"
            return f"the cache {self.cache_dir} cannot be written ({reason}): {remedy}"
        again = "run the same command again; files that are complete are kept"
        return f"the download of {self.name} broke off ({error}): {again}"
