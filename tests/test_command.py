"""What the command lines share: only the answer on stdout whatever stderr is, JSON in any encoding, one line
for each error, files written atomically."""

import io
import json
import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest
from command_line import ROOT, environment
from tqdm import tqdm

from paligemma import PaliGemmaError, command, load_hf_model
from paligemma.checkpoint import reading
from paligemma.command import STDERR, check_replaceable, exit_code, replacing, say, say_json, tell

# The process


def small(main: str, redirections: str, *args: str, **env: object) -> subprocess.CompletedProcess:
    """A new process, whose main function has the body `main`, with the redirections of a shell."""
    body = "\n    ".join(main.splitlines())
    imports = "import os, sys, warnings\nfrom paligemma import command"
    code = f"{imports}\ndef main():\n    {body}\n    return 0\ncommand.process(main)\n"
    shell = ["bash", "-c", f'"$@" {redirections}', "bash", sys.executable, "-c", code, *args]
    options = {"capture_output": True, "timeout": 60, "check": False}
    return subprocess.run(shell, cwd=ROOT, env=environment(**env), **options)


TALKS = """command.say("the answer\\n")
command.tell("a hint")
print("print", file=sys.stderr)
sys.stderr.write("no end of line")
warnings.warn("a warning")
os.write(2, b"from C") if sys.argv[1:] else None
command.say("all of it\\n")"""


@pytest.mark.parametrize(
    "redirection", ["2>&-", "2>/dev/full", "2>&- <&-", "2</dev/null", "2> >(exec true)", "2>/dev/null"],
    ids=["closed", "full", "stdin closed too", "for reading only", "a pipe without a reader", "discarded"],
)  # fmt: skip
def test_the_answer_is_on_stdout_alone_whatever_stderr_is(redirection):
    done = small(TALKS, redirection)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"the answer\nall of it\n", b"")


def test_a_stderr_that_works_has_everything():
    done = small(TALKS, "")
    assert (done.returncode, done.stdout) == (0, b"the answer\nall of it\n")
    assert done.stderr.startswith(b"a hint\nprint\nno end of line")
    assert b"a warning" in done.stderr


def test_the_lines_of_both_stay_whole_where_stderr_is_stdout():
    done = small('command.say("the answer\\n")\ncommand.tell("a hint")', "2>&1")
    assert (done.returncode, done.stdout) == (0, b"the answer\na hint\n")


def test_a_pipe_that_is_full_and_does_not_block_drops_what_it_cannot_take():
    writes = "for _ in range(3000):\n    command.tell('x' * 100)\ncommand.say('done\\n')"
    done = small(f"import fcntl\nos.set_blocking(2, False)\n{writes}", "2> >(sleep 2)")
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_what_is_written_to_a_closed_descriptor_is_in_no_file(tmp_path):
    """Without `process`, the first file that is opened would get the number 2."""
    writes = "    os.write(2, b'from C')\n    file.write('mine')"
    body = f"with open(sys.argv[1], 'w') as file:\n{writes}\ncommand.say('done\\n')"
    for redirection in ("2>&-", "2>&- <&-"):
        done = small(body, redirection, str(tmp_path / "file"))
        assert (done.returncode, done.stdout) == (0, b"done\n")
        assert (tmp_path / "file").read_text() == "mine"


def test_an_error_still_has_its_exit_code():
    work = "lambda: 1 / 0 if sys.argv[1:] else int(open('/no/such/file').read())"
    done = small(f"return command.exit_code({work})", "2>&-")
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize(
    ("redirection", "code", "err"),
    [(">/dev/full", 1, b"error: [Errno 28] No space left on device\n"), ("| exec true", 0, b"")],
)
def test_help_that_cannot_be_written(redirection, code, err):
    parse = "command.Parser().parse_args()"
    done = small(parse, redirection, "--help", PYTHONUNBUFFERED="")  # unbuffered, argparse hides the error
    assert (done.returncode, done.stderr) == (code, err)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16", "utf-8:strict"])
def test_json_is_json_in_any_encoding(encoding):
    value = {"prompt": "é 猫 🙂 \ud800", "path": os.fsdecode(b"\xff.png")}
    body = f"command.say_json({value!r})"
    done = small(body, "", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode(encoding.split(":")[0])) == value
    if "utf" in encoding:
        done = small("command.say_json('é 猫')", "", PYTHONIOENCODING=encoding)
        assert "é 猫" in done.stdout.decode(encoding.split(":")[0])


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "\\xe9 \\u732b"), ("cp1252", "é \\u732b"), ("utf-8", "é 猫")]
)
def test_text_that_an_encoding_does_not_have_is_escaped(encoding, shown):
    done = small("command.say('é 猫\\n')\ncommand.tell('é 猫')", "", PYTHONIOENCODING=encoding)
    assert done.stdout.decode(encoding) == done.stderr.decode(encoding) == f"{shown}\n"


# The same functions in a process that another program started


class Failing(io.StringIO):
    """A terminal to which every write fails."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def hung_up() -> io.TextIOWrapper:
    """A terminal whose other end has gone."""
    master, slave = pty.openpty()
    os.close(master)
    return io.TextIOWrapper(io.FileIO(slave, "w"), write_through=True)  # pyright: ignore[reportArgumentType]


BROKEN = {"none": lambda: None, "closed": closed, "a full terminal": Failing, "hung up": hung_up}


@pytest.mark.parametrize("stream", BROKEN)
def test_a_notice_and_a_bar_cannot_fail(stream, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", BROKEN[stream]())
    tell("a hint")
    for disable in (None, False):
        for _ in tqdm(range(3), file=STDERR, disable=disable, mininterval=0):
            pass
    assert capsys.readouterr().out == ""


def bar_at_once(**options) -> tqdm:
    """The bar that appears after a second of loading."""
    return tqdm(**{**options, "delay": 0, "mininterval": 0})


@pytest.mark.parametrize("stream", BROKEN)
def test_a_model_loads_slowly_whatever_stderr_is(tiny, stream, monkeypatch, capsys):
    monkeypatch.setattr(reading, "tqdm", bar_at_once)
    monkeypatch.setattr(sys, "stderr", BROKEN[stream]())
    load_hf_model(tiny, device="cpu", dtype="bfloat16")
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_the_bar(tiny, monkeypatch):
    """Otherwise the test above would prove nothing."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(reading, "tqdm", bar_at_once)
    monkeypatch.setattr(sys, "stderr", terminal)
    load_hf_model(tiny, device="cpu", dtype="bfloat16")
    assert "loading weights" in terminal.getvalue()


def test_nothing_is_said_to_a_stdout_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("text")
    say_json({"é": "\ud800"})


def raised(error: BaseException):
    def work() -> int:
        raise error

    return work


NO_FILE = "No such file or directory"
ALLOCATION = "[enforce fail] DefaultCPUAllocator: you tried to allocate 8 bytes.\nmore"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PaliGemmaError("of two\n  lines"), 1, "error: of two lines"),
        (MemoryError(), 1, "error: out of memory: --dtype bfloat16 takes the least"),
        (RuntimeError(ALLOCATION), 1, "error: out of memory: [enforce fail]"),
        (FileNotFoundError(2, NO_FILE, "x"), 1, f"error: [Errno 2] {NO_FILE}: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line(error, code, line, capsys):
    assert exit_code(raised(error)) == code
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert err.strip().startswith(line)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x")]
)
def test_an_error_of_this_package_is_not_hidden(error):
    with pytest.raises(type(error)):
        exit_code(raised(error))


def test_wrong_usage_is_one_line_that_names_the_choices(capsys):
    parser = command.Parser(prog="command")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    for given, words in (
        (["--dtype", "int8"], ("int8", "float32", "bfloat16")),
        (["two\nlines"], ("two lines",)),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(given)
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("error: ")
        assert err.endswith("(command --help explains the options)\n")
        assert all(word in err for word in words)


# Files


def mode(path) -> int:
    return path.stat().st_mode & 0o777


def write(path, content: bytes = b"after") -> None:
    with replacing(path) as file:
        file.write(content)


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert (mode(tmp_path / "new"), (tmp_path / "new").read_bytes()) == (0o640, b"after")


@pytest.mark.parametrize("permissions", [0o600, 0o664, 0o755])
def test_an_existing_file_keeps_its_mode(tmp_path, permissions):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(permissions)
    with replacing(path) as file:
        (partial,) = set(tmp_path.iterdir()) - {path}
        assert mode(partial) == 0o600  # never more open than the old one
        file.write(b"after")
    assert (mode(path), path.read_bytes(), list(tmp_path.iterdir())) == (permissions, b"after", [path])


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to none"])
def test_a_link_stays_and_its_target_is_written(tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    target, link, second = tmp_path / "elsewhere" / "target", tmp_path / "link", tmp_path / "second"
    link.symlink_to("elsewhere/target")
    second.symlink_to(link)
    if there:
        target.write_bytes(b"before")
        target.chmod(0o600)
    check_replaceable(second)
    write(second)
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.read_bytes() == b"after"
    assert os.listdir(target.parent) == ["target"]
    assert not there or mode(target) == 0o600


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, there):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"before")
    with suppress(OSError), replacing(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == (["file"] if there else [])
    assert not there or path.read_bytes() == b"before"


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "nowhere").symlink_to(tmp_path / "no" / "such" / "file")
    faults = dict.fromkeys(("pipe", "device"), "is not a regular file")
    for name, message in {**faults, "nowhere": "its directory is missing"}.items():
        with pytest.raises(PaliGemmaError, match=message):
            check_replaceable(tmp_path / name)


def test_a_file_that_is_read_only_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    # The user who runs the tests may be root, who may write any file.
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.isdir(path))
    with pytest.raises(PaliGemmaError, match="file cannot be written: it is read-only"):
        check_replaceable(tmp_path / "file")


# The threads


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, ("passive", "10000")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
        ({"GOMP_SPINCOUNT": "0"}, (None, "0")),
    ],
    ids=str,
)
def test_threads_wait_as_the_environment_says(given, kept, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", copy := dict(os.environ))
    command.wait_briefly()
    assert (copy.get("OMP_WAIT_POLICY"), copy.get("GOMP_SPINCOUNT")) == kept
