"""The inputs of `paligemma.batch`: the pictures of a directory or a pattern, or the lines of a JSONL file."""

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from .answers import prompts
from .errors import PaliGemmaError
from .fields import shown

FIELDS = ("id", "image", "prompt", "task", "lang")  # of a line
NO_PICTURES = (
    "EPS",
    "MPEG",
    "WMF",
    "HDF5",
    "GRIB",
    "BUFR",
)  # formats that Pillow knows and cannot read alone
LONGEST = 1 << 20  # bytes of a line


class Asked(NamedTuple):
    """A prompt about a picture in a file, or about several in a list."""

    id: str | int
    image: str | list[str]
    prompt: str
    task: str | None  # the task that wrote the prompt


def pictures(where: str, prompt: str, task: str | None) -> list[Asked]:
    """The prompt about each picture of a directory, by name, or of a pattern such as 'photos/**/*.jpg'. The
    id is the name in the directory, or the path that matches the pattern. Raises PaliGemmaError if there is
    none."""
    if os.path.isdir(where):
        from PIL import Image

        readable = Image.registered_extensions().items()
        endings = tuple(end for end, kind in readable if kind in Image.OPEN and kind not in NO_PICTURES)
        with os.scandir(where) as entries:
            names = sorted(e.name for e in entries if e.name.lower().endswith(endings) and e.is_file())
        found = [Asked(name, os.path.join(where, name), prompt, task) for name in names]
        problem = f"the directory {where} has no file whose name ends like a picture's"
    else:
        matches = [where] if os.path.isfile(where) else glob.glob(where, recursive=True)
        paths = sorted(path for path in matches if os.path.isfile(path))
        found = [Asked(path, path, prompt, task) for path in paths]
        problem = f"{where} is not a directory, and no file matches it"
    if not found:
        raise PaliGemmaError(f"{problem}: give a directory, or a pattern in quotes such as 'photos/*.jpg'")
    return found


class Lines:
    """The inputs of a JSONL file, read one line at a time, whenever it is iterated over; "-" is stdin, which
    can be read once. A line that is wrong raises PaliGemmaError with its number.

    prompt, task: for lines that have none of their own."""

    def __init__(self, path: str, prompt: str | None, task: str | None):
        self.path, self.prompt, self.task = path, prompt, task
        self.name = "stdin" if path == "-" else path
        self.stream = path == "-" or (
            os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
        )
        self.directory = "" if self.stream else os.path.dirname(path)

    def __iter__(self) -> Iterator[Asked]:
        if self.path == "-":
            if sys.stdin is None:
                raise PaliGemmaError("--jsonl - reads stdin, which is closed")
            yield from self._read(sys.stdin.buffer)
            return
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise PaliGemmaError(f"--jsonl {self.path} cannot be read: {error.strerror}") from None
        with file:
            yield from self._read(file)

    def _read(self, file: BinaryIO) -> Iterator[Asked]:
        first: dict[str, int] = {}  # id -> the line that has it
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if not line.strip():
                continue
            asked = self._asked(
                line, lambda problem, n=number: PaliGemmaError(f"{self.name}, line {n}: {problem}")
            )
            if str(asked.id) in first:
                already = f"the id {shown(asked.id)} is that of line {first[str(asked.id)]} too"
                raise PaliGemmaError(f"{self.name}, line {number}: {already}: give each line its own")
            first[str(asked.id)] = number
            yield asked

    def _asked(self, line: bytes, wrong: Callable[[str], PaliGemmaError]) -> Asked:
        if len(line) > LONGEST:
            raise wrong(f"it is longer than {LONGEST:,} bytes: is the file JSONL?")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise wrong(f"it is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise wrong(f"it is {shown(value)}; it must be an object with {', '.join(FIELDS[:3])}")
        unknown = [name for name in value if name not in FIELDS]
        if unknown:
            raise wrong(f"it has {shown(unknown[0])}; the names are {', '.join(FIELDS)}")
        id, image = value.get("id"), value.get("image")
        if not isinstance(id, (str, int)) or isinstance(id, bool):
            raise wrong(f"id is {shown(id)}; it must be a text or a whole number")
        paths: list[Any] = image if isinstance(image, list) else [image]
        if not paths or not all(isinstance(path, str) and path and "\0" not in path for path in paths):
            raise wrong(f"image is {shown(image)}; it must be the path of a picture, or a list of paths")
        prompt, task = prompt_of(value, (self.prompt, self.task), wrong)
        found = [os.path.join(self.directory, path) for path in paths]
        return Asked(id, found if len(found) > 1 else found[0], prompt, task)


def prompt_of(
    value: Mapping[str, Any], default: tuple[str | None, str | None], wrong: Callable[[str], PaliGemmaError]
) -> tuple[str, str | None]:
    """The prompt of an input with `prompt`, `task` and `lang`, and its task. default: those of an input with
    neither prompt nor task. wrong: makes the error that is raised from a description of the problem."""
    for name in ("prompt", "task", "lang"):
        text = value.get(name)
        if name in value and not isinstance(text, str):
            raise wrong(f"{name} is {shown(text)}; it must be a text")
        if text is not None and not _is_text(text):
            raise wrong(f"{name} is {shown(text)}; it must be UTF-8 text")
    if "task" in value:
        try:
            prompt = prompts.prompt(value["task"], value.get("prompt"), value.get("lang"))
        except PaliGemmaError as error:
            raise wrong(str(error)) from None
        return prompt, value["task"]
    if "lang" in value:
        raise wrong("lang goes with a task; without one, write the language in the prompt")
    if "prompt" in value:
        return value["prompt"], None
    if default[0] is None:
        raise wrong("it has neither prompt nor task, and no default was given")
    return default[0], default[1]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
