"""Runs `python -m paligemma.generate` many times: a process that has imported torch forks for each run.

Importing torch takes seconds and a fork milliseconds. A child has its own arguments, environment, directory,
stdin, stdout and stderr, and runs the module as `python -m` does. Children share only the earlier imports.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 120  # seconds until a command that hangs is killed; the slowest takes a few


class Finished(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()


class Command:
    """A command line that is running. The end of a `with` block kills it if it still runs."""

    def __init__(
        self, *args, stdin=b"", stdout: int | None = None, env: dict | None = None, cwd=ROOT,
        module: str = "paligemma.generate",
    ):  # fmt: skip
        argv = [os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in args]
        request = {"argv": argv, "env": environment(**env or {}), "cwd": str(cwd), "module": module}
        self.stdout, write = os.pipe() if stdout is None else (None, stdout)
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self.server, self.code = server(), None
        with tempfile.TemporaryFile() as standard_input:
            standard_input.write(stdin)
            standard_input.seek(0)
            fds = [standard_input.fileno(), write, self.stderr.fileno()]
            socket.send_fds(self.server, [json.dumps(request).encode()], fds)
            self.pid = self._receive()
        if stdout is None:
            os.close(write)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *exception) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):  # the process may have ended
                os.kill(self.pid, signal.SIGKILL)
            self._receive()
        self.close()
        self.stderr.close()

    def read(self) -> bytes:
        """Some bytes of stdout as soon as there are any; b"" at its end."""
        return os.read(self.stdout, 1 << 16)

    def close(self) -> None:
        """Stop reading stdout, as `| head` does."""
        if self.stdout is not None:
            os.close(self.stdout)
        self.stdout = None

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def finish(self) -> Finished:
        out = b"".join(iter(self.read, b"")) if self.stdout is not None else b""
        self.code = self._receive()
        self.stderr.seek(0)
        return Finished(self.code, out, self.stderr.read().decode())

    def _receive(self) -> int:
        try:
            return json.loads(self.server.recv(64))
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            self.code = json.loads(self.server.recv(64))
            raise


def run(*args, **kwargs) -> Finished:
    """Run the command line to its end."""
    with Command(*args, **kwargs) as command:
        return command.finish()


def real(*args, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
    """The same in a new process, which imports everything itself."""
    command = [sys.executable, "-m", "paligemma.generate", *map(str, args)]
    options = {"cwd": ROOT, "env": environment(**env or {}), "timeout": TIMEOUT, "check": False, **kwargs}
    return subprocess.run(command, capture_output=True, **options)


def environment(**changes: object) -> dict[str, str]:
    """The environment with these changes, without GPUs, proxies and the settings of the hub and of Triton.

    The number of threads is 1: a second one does not speed up a small model, and costs seconds on a busy
    machine.
    """
    clean = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name, value in os.environ.items():
        if not name.startswith(("HF_", "TRITON_")) and not name.lower().endswith("_proxy"):
            clean.setdefault(name, value)
    return clean | {name: str(value) for name, value in changes.items()}


def assert_one_line(done: Finished, *parts: object, code: int = 1) -> None:
    """Assert a failure: this exit code, one line on stderr with these parts, and nothing on stdout."""
    assert done.code == code, done
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: "), done.err
    for part in parts:
        assert str(part) in done.err, done.err
    assert done.out == b""


def wait_for(condition, seconds: float = TIMEOUT) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.005)


@lru_cache(maxsize=1)
def server() -> socket.socket:
    """The connection to the process that forks. That process ends when this one ends."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)  # recv returns one message, never two
    command, env = [sys.executable, __file__, str(theirs.fileno())], environment(PYTHONPATH=ROOT)
    subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env=env, start_new_session=True)
    theirs.close()
    ours.settimeout(TIMEOUT)
    return ours


def serve(connection: socket.socket) -> None:
    """In the process that forks: start a child for each request, and send its pid and later its exit code."""
    import huggingface_hub.file_download  # noqa: F401

    import paligemma.compare
    import paligemma.loading
    import paligemma.pipeline  # noqa: F401  these import torch

    # huggingface_hub reads the environment when it is imported, so each child imports it again. The other
    # modules that this import has loaded may stay.
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    gc.freeze()  # otherwise a child's first garbage collection copies every page
    while True:
        message, fds, *_ = socket.recv_fds(connection, 1 << 16, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            become(**json.loads(message), fds=fds)
        for fd in fds:
            os.close(fd)
        connection.sendall(json.dumps(pid).encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def become(argv: list[str], env: dict[str, str], cwd: str, module: str, fds: list[int]) -> NoReturn:
    """In the child: become the requested command line."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = sys.__stdin__ = open(0)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *argv]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
    except OSError:  # Python ends with this code if it cannot flush stdout
        traceback.print_exc()
        code = 120
    os._exit(code)  # the interpreter's own shutdown would take longer than everything before it


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
