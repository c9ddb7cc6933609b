"""A JSONL file that a run appends to, and that a later run resumes. Whatever ends a run, the file has whole
lines, except perhaps for the last one."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .command import check_replaceable, replacing
from .errors import PaliGemmaError

BEGINNING = b'{"id": '  # of every line


class Output:
    """The answers in a file, one a line, by id. One process at a time can have it open; the others raise
    PaliGemmaError.

    Opening it removes a torn last line, and the lines with an error, so that these are tried again. A file
    with any other line is refused. `done` has the hash of prompt and picture of each id that is answered.
    model: the name that every line must have."""

    def __init__(self, path: str, model: str):
        check_replaceable(path)
        self.path, self.model = Path(os.path.realpath(path)), model
        self.done: dict[str, int] = {}
        self.lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise PaliGemmaError(
                f"another run is writing {path}: wait for it, or give another --out"
            ) from None
        try:
            self._resume()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self.file = os.open(self.path, flags, 0o666)
        except BaseException:
            self.lock.release()
            raise

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        self.lock.release()

    def answered(self, id: str | int, prompt: str, image: str | list[str]) -> bool:
        """Whether the file has the answer to this prompt about this picture, or these. Raises PaliGemmaError
        if the id was given another prompt or picture."""
        told = self.done.get(str(id))
        paths = tuple(map(os.path.abspath, [image] if isinstance(image, str) else image))
        if told not in (None, hash((prompt, paths)), hash((prompt, None))):
            problem = f"{self.path.name} has an answer to another prompt or picture for the id {id!r}"
            raise PaliGemmaError(f"{problem}: give another --out")
        return told is not None

    def write(self, value: dict[str, Any]) -> None:
        """Append a line. If it cannot be written as a whole, none of it is, and OSError is raised."""
        line, before = _line(value), os.fstat(self.file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self.file, line[written:])
        except BaseException:
            os.ftruncate(self.file, before)
            raise

    def _resume(self) -> None:
        whole = 0  # bytes of whole lines
        if not self.path.exists():
            return
        failed: set[int] = set()  # the lines with an error
        with open(self.path, "rb") as file:
            for n, line in enumerate(file):
                if not line.endswith(b"\n"):
                    self._check_torn(line, n + 1)
                    break
                whole += len(line)
                if not self._read(line, n + 1):
                    failed.add(n)
        if failed:
            with open(self.path, "rb") as old, replacing(self.path) as new:
                new.writelines(line for n, line in enumerate(old) if n not in failed and line.endswith(b"\n"))
        elif whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def _check_torn(self, line: bytes, number: int) -> None:
        """Raise PaliGemmaError unless a line without an end is the beginning of one of this command's."""
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            if not (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                raise self._wrong(number) from None
        else:  # all of it but its end: it is computed again, but nobody else's file is emptied
            if self._read(line, number):
                self.done.popitem()

    def _read(self, line: bytes, number: int) -> bool:
        """Whether a line is an answer; if not, it is an error. Raises PaliGemmaError for any other line."""
        try:
            value = json.loads(line)
            id, error = value["id"], value.get("error")
            if value.keys() == {"id", "error"} and isinstance(error, str):
                return False
            model, prompt = value["model"], value["prompt"]
            paths = tuple(image.get("path") for image in value.get("images") or [value.get("image", {})])
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise self._wrong(number) from None
        if error is not None or str(id) in self.done or not isinstance(prompt, str):
            raise self._wrong(number)
        if model != self.model:
            other = f"line {number} is an answer of the model {model}, not of {self.model}"
            raise PaliGemmaError(f"{self.path}, {other}: give another --out")
        self.done[str(id)] = hash((prompt, paths if all(isinstance(p, str) for p in paths) else None))
        return True

    def _wrong(self, number: int) -> PaliGemmaError:
        problem = f"{self.path}, line {number} is not an answer of this command"
        return PaliGemmaError(f"{problem}: give another --out")


def _line(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, as in a file name that is not UTF-8
        return json.dumps(value).encode() + b"\n"
