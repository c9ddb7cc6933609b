"""What the command lines share: streams that cannot fail, one line for each error, files written atomically.

if __name__ == "__main__":
    command.process(main)
"""

import argparse
import io
import json
import math
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from .errors import PaliGemmaError


class _Stderr:
    """The current sys.stderr. If it is missing, closed or cannot be written, the text is silently dropped.

    If sys.stderr is None, print(file=sys.stderr) and tqdm(file=sys.stderr) write to stdout, or fail."""

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        with suppress(AttributeError, OSError, ValueError):  # None; full or gone; closed
            sys.stderr.write(_encodable(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        try:
            return sys.stderr.isatty()
        except (AttributeError, OSError, ValueError):
            return False

    def fileno(self) -> int:  # tqdm asks it for the width of the terminal
        return sys.stderr.fileno()


STDERR = _Stderr()


def tell(line: str) -> None:
    """Write a line to stderr, if it can be written."""
    print(line, file=STDERR, flush=True)


def fail(message: str) -> None:
    """Write an error to stderr in one line, even if the message contains line breaks."""
    tell(f"error: {' '.join(part.strip() for part in message.splitlines())}")


def say(text: str) -> None:
    """Write text to stdout at once; characters that its encoding lacks become escapes such as \\u732b."""
    print(_encodable(text, getattr(sys.stdout, "encoding", None) or "utf-8"), end="", flush=True)


def say_json(value: Any) -> None:
    """Write one line of JSON to stdout, escaped to ASCII if its encoding lacks one of the characters."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # no encoding has half of a surrogate pair, as in a file name
        line = json.dumps(value)
    print(line, flush=True)


def _encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


# The process


class _Unfailing(io.FileIO):
    """A file descriptor that drops what cannot be written. Python's own file object would raise an error, and
    raise it again when the process ends (exit code 120)."""

    def write(self, data: Any) -> int:
        everything = memoryview(data).nbytes
        try:
            return super().write(data) or everything  # write returns None for a full, non-blocking pipe
        except OSError:
            return everything


def wait_briefly() -> None:
    """Let the threads of OpenMP spin for about 0.1 ms while they wait, and then sleep, unless the environment
    says otherwise. It is read when torch is imported.

    Spinning threads take a core from other processes and from each other: if one other process is busy, a
    token of PaliGemma 3B takes 2.3 times as long with threads that spin, and 1.4 times as long with threads
    that sleep at once. On an idle machine, a token takes 7 % longer with threads that sleep at once than with
    those that spin briefly."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


def process(main: Callable[[], int]) -> NoReturn:
    """Run the main function of a command and end the process with its exit code.

    After this call stderr cannot fail. A closed standard descriptor is opened on os.devnull; otherwise the
    next opened file would get its number, and a library that writes to descriptor 2 would write into it."""
    signal.signal(signal.SIGINT, interrupted)
    wait_briefly()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(opened, True)
    raw, encoding = io.BufferedWriter(_Unfailing(2, "wb", closefd=False)), STDERR.encoding
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)
    try:
        code = main()
    except SystemExit as end:  # raised by argparse
        code = end.code
    if (error := _unwritable()) and not code:  # the text of --help could not be written
        if not isinstance(error, BrokenPipeError):
            fail(str(error))
        code = 1
    sys.exit(code)


def exit_code(work: Callable[[], int]) -> int:
    """The result of `work`; 1, with one line on stderr, for an error the user can fix; 130 for Ctrl-C."""
    try:
        return work()
    except KeyboardInterrupt:
        tell("\ninterrupted")
        return 130
    except (PaliGemmaError, MemoryError) as error:
        message = str(error) or "out of memory: --dtype bfloat16 takes the least"
    except RuntimeError as error:  # torch's error for too little memory, on CPU and GPU
        if "tried to allocate" not in str(error).lower():
            raise
        message = f"out of memory: {str(error).splitlines()[0]}"
    except OSError as error:
        message = str(error)
        _unwritable()
        if isinstance(error, BrokenPipeError):  # the reader closed the pipe, as `head` does
            return 1
    fail(message)
    return 1


def _unwritable() -> OSError | None:
    """The error of writing to stdout (a full disk, a closed pipe), or None. After an error the buffered text
    is discarded, because Python would try to write it again when the process ends."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def interrupted(*_) -> None:
    """The first Ctrl-C ends the work cleanly, which a download can delay; the second ends it at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
    raise KeyboardInterrupt


# Arguments


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage in one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} ({self.prog} --help explains the options)")
        raise SystemExit(2)


def at_least(least: int) -> Callable[[str], int]:
    """The argparse type of an option whose value is a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def temperature(text: str) -> float:
    value = _float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 (greedy) or a positive number")
    return value


def probability(text: str) -> float:
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# Files


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file to write, which replaces `path` at the end of the block; if the block raises, `path` is
    unchanged.

    If `path` is a symbolic link, its target is replaced. The mode of an existing file is kept."""
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{os.urandom(8).hex()}.part")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(partial, flags, 0o666 if mode is None else 0o600), "wb") as file:
            yield file
        if mode is not None:
            partial.chmod(mode)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(path: str | Path) -> None:
    """Raise PaliGemmaError, before any work is done, if `replacing` could not write this path."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise PaliGemmaError(f"{path} is not a regular file: give another name")
    if not os.access(target.parent, os.W_OK):
        raise PaliGemmaError(f"{path} cannot be written: its directory is missing or read-only")
    if target.exists() and not os.access(target, os.W_OK):
        raise PaliGemmaError(f"{path} cannot be written: it is read-only")
