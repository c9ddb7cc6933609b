"""The command line: its output on stdout and stderr, its options, and one line for every fault."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import config_dict, random_weights, rename, write_checkpoint
from command_line import ROOT, Command, assert_one_line, environment, real, run, wait_for
from PIL import Image
from safetensors.torch import load_file, save_file

from paligemma import load_hf_model, reference
from paligemma.config import PaliGemmaConfig
from paligemma.processor import Processor
from paligemma.tokenizer import TextStream, Tokenizer

PROMPT = "caption en"
NORM = "language_model.model.norm.weight"
TIMINGS = (
    r"load \d+\.\d\d s, first token \d+\.\d\d s( \(vision \d+\.\d\d s\))?, "
    r"(?P<tokens>\d+) tokens?(, \d+\.\d\d ms each)?\n"
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tokenizer_model) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sharded") / "model", tokenizer_model, shards=3)


@pytest.fixture(scope="module")
def models(tiny) -> Iterator[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the command lines: another order of sums might give another answer
    yield {dtype: load_hf_model(tiny, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")}
    torch.set_num_threads(threads)


@pytest.fixture
def copy(sharded, tmp_path) -> Path:
    """A checkpoint in three shards, to be damaged."""
    return shutil.copytree(sharded, tmp_path / "model")


def expected(models, image_file, dtype: str = "bfloat16", **options) -> tuple[list[int], str]:
    model, processor = models[dtype]
    inputs = processor(text=[PROMPT], images=[Image.open(image_file)])
    ids = model.generate(**inputs, **{"max_new_tokens": 20, **options})[0].tolist()
    return ids, processor.tokenizer.decode(ids)


def line(model: object, image: object, *args: object, prompt: object = PROMPT) -> list[object]:
    """The arguments of a command line; if an option is given twice, the last value counts."""
    return ["--model", model, "--image", image, "--prompt", prompt, "--max-new-tokens", 20, *args]


# The output.


def test_the_answer_and_nothing_else_is_on_stdout(models, tiny, image_file):
    done = real(*line(tiny, image_file, "--no-sample", "--dtype", "float32"))
    assert (done.returncode, done.stdout.decode()) == (0, expected(models, image_file, "float32")[1] + "\n")
    assert re.fullmatch(TIMINGS, done.stderr.decode())


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}  # the defaults
WARM = {"do_sample": True, "temperature": 3.0, "seed": 7}


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["--no-sample"], {}),
        (["--temperature", "0"], {}),
        (["--no-sample", "--dtype", "float32"], {"dtype": "float32"}),
        (["--no-sample", "--max-new-tokens", "3"], {"max_new_tokens": 3}),
        (["--no-sample", "--max-new-tokens", "1"], {"max_new_tokens": 1}),
        (["--seed", "7"], {**SAMPLED, "seed": 7}),
        (["--seed", "8"], {**SAMPLED, "seed": 8}),
        (["--seed", "7", "--temperature", "3"], {**WARM, "top_p": 0.9}),
        (["--seed", "7", "--temperature", "3", "--top-p", "0.3"], {**WARM, "top_p": 0.3}),
        (["--seed", "7", "--temperature", "3", "--top-p", "1"], {**WARM, "top_p": 1.0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_options_reach_the_model(models, tiny, image_file, args, options):
    ids, text = expected(models, image_file, **options)
    done = run(*line(tiny, image_file, *args))
    assert (done.code, done.text) == (0, text + "\n")
    assert re.fullmatch(TIMINGS, done.err)["tokens"] == str(len(ids))


def test_these_options_make_a_difference(models, image_file):
    """Otherwise the test above would prove nothing."""
    sampled = [{**SAMPLED, "seed": seed} for seed in (7, 8)] + [{**WARM, "top_p": p} for p in (0.9, 0.3, 1.0)]
    assert len({expected(models, image_file, **options)[1] for options in ({}, *sampled)}) == 6


def test_without_a_seed_every_answer_is_another(tiny, image_file):
    args = line(tiny, image_file, "--temperature", 5, "--top-p", 1)  # equal with a probability of 10^-60
    assert run(*args).text != run(*args).text


def test_json(models, tiny, image_file):
    done = run(*line(tiny, image_file, "--no-sample", "--json"))
    ids, text = expected(models, image_file)
    assert done.text.count("\n") == 1
    answer = json.loads(done.text)
    timings, log_probs = answer.pop("timings"), answer.pop("log_probs")
    objects, faults = answer.pop("objects"), answer.pop("faults")
    size = dict(zip(("width", "height"), Image.open(image_file).size, strict=True))
    model, processor = models["bfloat16"]
    ended = "stop" if ids[-1] in model.config.eos_token_ids else "length"
    asked = {"model": str(tiny), "image": size, "prompt": PROMPT}
    assert answer == {**asked, "text": text, "finish_reason": ended, "tokens": ids}
    told: list[torch.Tensor] = []
    model.generate(**processor(PROMPT, image_file), max_new_tokens=20, log_probs=told)
    assert log_probs == pytest.approx([float(value) for value in told], abs=1e-6)
    parsed = processor.parse(ids, Image.open(image_file).size, log_probs)
    assert [(o["label"], tuple(o["box"]), o["score"]) for o in objects] == [
        (o.label, o.box, pytest.approx(o.score, abs=2e-6)) for o in parsed.objects
    ]
    assert faults == [{"text": part.text, "fault": part.fault} for part in parsed.faults]
    assert timings["new_tokens"] == len(ids)
    assert timings["load_s"] > 0 < timings["first_token_s"]
    assert timings["tokens_per_s"] > 0
    meaningless = {"weights_gb_per_s", "machine_gb_per_s", "held_gb"}  # for a model as small as this one
    assert not meaningless & set(timings)
    assert 0 < timings["vision_s"] <= timings["first_token_s"]
    assert timings["ms_per_token"] == pytest.approx(1e3 / timings["tokens_per_s"], rel=0.01)
    assert re.fullmatch(TIMINGS, done.err)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_reference_answers(tiny, image_file, dtype):
    args = ["--dtype", dtype] if dtype != "float64" else []  # float64 is the default
    done = run(*line(tiny, image_file, "--backend", "reference", "--no-sample", "--max-new-tokens", 6, *args))
    processor = Processor.load(tiny)
    inputs = processor.arrays(PROMPT, image_file)
    (ids,) = reference.load(tiny, dtype=dtype).generate(**inputs, max_new_tokens=6)
    assert (done.code, done.text) == (0, processor.tokenizer.decode(ids) + "\n")
    assert re.fullmatch(TIMINGS, done.err)


def test_the_reference_and_the_model_agree(models, tiny, image_file):
    """Greedy tokens are equal in float32."""
    args = line(tiny, image_file, "--no-sample", "--json", "--dtype", "float32")
    for backend in ("torch", "reference"):
        tokens = json.loads(run(*args, "--backend", backend).text)["tokens"]
        assert tokens == expected(models, image_file, "float32")[0]


def test_the_reference_samples_what_the_model_samples(tiny, image_file):
    args = line(tiny, image_file, "--seed", 3, "--dtype", "float32")
    assert run(*args, "--backend", "reference").out == run(*args).out


def test_the_image_can_come_from_stdin(tiny, image_file):
    args = ["--no-sample", "--max-new-tokens", 5]
    done = run(*line(tiny, "-", *args), stdin=image_file.read_bytes())
    assert done.out == run(*line(tiny, image_file, *args)).out


@pytest.mark.parametrize(("most", "reason"), [(3, "length"), (12, "stop")])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_why_an_answer_ended(backend, most, reason):
    image = ROOT / "paligemma" / "demo" / "samples" / "shapes.png"
    args = ["--dtype", "float32", "--backend", backend, "--json", "--max-new-tokens", most]
    said = json.loads(run(*line("demo", image, *args, prompt="detect red circle")).text)
    assert said["finish_reason"] == reason
    assert said["image"] == dict(zip(("width", "height"), Image.open(image).size, strict=True))


@pytest.mark.parametrize(
    ("prompt", "args", "who"),
    [
        ("detect cat", [], "a prompt that begins with 'detect'"),
        ("segment cat", [], "a prompt that begins with 'segment'"),
        ("ocr", [], "a prompt that begins with 'ocr'"),
        (" ocr\n", ["--seed", 1], "a prompt that begins with 'ocr'"),
        ("cat", ["--task", "detect"], "--task detect"),
        ("is it?", ["--task", "vqa"], "--task vqa"),
    ],
)
def test_what_is_greedy_by_itself_says_so(tiny, image_file, prompt, args, who):
    done = run(*line(tiny, image_file, *args, prompt=prompt))
    hint, timings = done.err.splitlines()
    assert hint == f"hint: {who} is answered greedily; give --temperature to sample"
    assert re.fullmatch(TIMINGS, timings + "\n")
    for asked in (["--no-sample"], ["--temperature", 0]):
        same = run(*line(tiny, image_file, *args, *asked, prompt=prompt))
        assert (done.code, done.out) == (same.code, same.out)
        assert re.fullmatch(TIMINGS, same.err)
    warm = run(*line(tiny, image_file, *args, "--temperature", 5, "--top-p", 1, "--seed", 1, prompt=prompt))
    assert warm.out != done.out
    assert re.fullmatch(TIMINGS, warm.err)


@pytest.mark.parametrize("prompt", ["caption en", "detective", "answer en detect", "", "Detect cat"])
def test_other_prompts_are_sampled(tiny, image_file, prompt):
    first, second = (run(*line(tiny, image_file, "--seed", seed, prompt=prompt)) for seed in (1, 2))
    assert first.out != second.out
    assert re.fullmatch(TIMINGS, first.err)


SLOW = """if True:
    import runpy, sys, time
    from paligemma.checkpoint import reading
    read = reading._read
    def slow(*args):
        time.sleep(0 if "slept" in globals() else 1.2)
        globals()["slept"] = True
        return read(*args)
    reading._read = slow
    sys.argv[0] = "paligemma.generate"
    runpy.run_module("paligemma.generate", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_model_that_loads_slowly_answers_whatever_stderr_is(models, tiny, image_file, redirection):
    """stderr gets a hint, a progress bar after a second of loading, and then the timings."""
    args = map(str, line(tiny, image_file, "--dtype", "float32", "--json", prompt="detect cat"))
    shell = ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-c", SLOW, *args]
    done = subprocess.run(shell, cwd=ROOT, env=environment(), capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    said = json.loads(done.stdout)
    model, processor = models["float32"]
    ids = model.generate(**processor("detect cat", image_file), max_new_tokens=20)
    assert [said["tokens"]] == ids.tolist()
    assert said["timings"]["load_s"] > 1


def in_bash(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script of bash with these arguments."""
    shell = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(shell, cwd=ROOT, env=environment(), capture_output=True, timeout=120, check=False)


COMMAND = (sys.executable, "-m", "paligemma.generate")


def test_a_stdout_that_is_closed(tiny, image_file):
    done = in_bash('"$@" >&-', *COMMAND, *line(tiny, image_file))
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: stdout is closed, and the answer is printed there")


def test_a_prompt_of_any_characters_is_answered(tiny, image_file):
    prompt = "Was ist das? 猫 🙂 <bos><image>\n\ttab"
    assert run(*line(tiny, image_file, "--no-sample", "--json", prompt=prompt)).code == 0
    assert run(*line(tiny, image_file, "--no-sample", prompt="")).code == 0


# Text while it is generated.


@pytest.mark.parametrize("text", ["naïve €uro", "🙂🙃 猫", "a b  c\n\nd", "<loc0012>é<seg003>"])
def test_a_character_of_several_tokens_comes_whole(tokenizer_model, text):
    tokenizer = Tokenizer(tokenizer_model, PaliGemmaConfig.from_dict(config_dict()))
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert ("" in pieces) == (not text.isascii())  # bytes that were held back


def test_a_character_that_stays_cut_is_shown_at_the_end(tokenizer_model):
    tokenizer = Tokenizer(tokenizer_model, PaliGemmaConfig.from_dict(config_dict()))
    stream = TextStream(tokenizer)
    tokens = [*tokenizer.encode("a"), *tokenizer.encode("€")[:-1]]
    assert len(tokens) == 3
    assert "".join(map(stream.push, tokens)) == "a"
    assert set(stream.finish()) == {"\ufffd"}


def test_the_answer_arrives_piece_by_piece(tiny, image_file):
    args = ["--backend", "reference", "--seed", 1, "--max-new-tokens", 40]
    with Command(*line(tiny, image_file, *args)) as command:
        pieces = list(iter(command.read, b""))
        done = command.finish()
    assert done.code == 0
    tokens = int(re.fullmatch(TIMINGS, done.err)["tokens"])
    assert len(pieces) > tokens / 3  # a slow reader gets several pieces at once, but not all of them


# Interrupted commands.


def test_control_c_keeps_what_was_said(tiny, image_file):
    args = line(tiny, image_file, "--dtype", "float32", "--seed", 1, "--max-new-tokens", 100)
    with Command(*args, "--backend", "reference") as command:  # it is slow, and has many tokens left
        said = command.read()
        command.interrupt()
        done = command.finish()
    assert (done.code, done.err) == (130, "\ninterrupted\n")
    said += done.out
    whole = run(*args).out
    assert said.endswith(b"\n")
    assert whole.startswith(said[:-1])
    assert len(said) < len(whole)


def test_control_c_while_the_image_is_read(tiny, tmp_path):
    """The image is a pipe to which nothing is written."""
    os.mkfifo(tmp_path / "image.png")
    with Command(*line(tiny, tmp_path / "image.png")) as command:
        writing = []
        wait_for(lambda: writing.append(open_for_writing(tmp_path / "image.png")) or writing[-1])
        command.interrupt()
        assert command.finish() == (130, b"", "\ninterrupted\n")
    os.close(writing[-1])


def open_for_writing(pipe: Path) -> int | None:
    """A descriptor of the pipe; None as long as nobody reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_control_c_while_torch_is_imported(tiny, image_file, tmp_path):
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(code)
    done = real(*line(tiny, image_file), env={"PYTHONPATH": tmp_path})
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"\ninterrupted\n")


STREAMED = ["--backend", "reference", "--max-new-tokens", 100]


@pytest.mark.parametrize("args", [STREAMED, ["--json"]], ids=["piece by piece", "at the end"])
def test_a_reader_that_goes_away_ends_it_in_silence(tiny, image_file, args):
    with Command(*line(tiny, image_file, "--seed", 1, *args)) as command:
        if "--json" not in args:
            command.read()
        command.close()
        assert command.finish() == (1, b"", "")


def test_a_pipe_into_head(tiny, image_file):
    """In a new process: when a process ends, Python writes the buffered text, and reports an error if it
    cannot."""
    args = line(tiny, image_file, "--temperature", 5, "--seed", 1, "--max-new-tokens", 100)
    done = in_bash('"$@" | head -c 1; exit ${PIPESTATUS[0]}', *COMMAND, *args)
    assert (done.returncode, len(done.stdout), done.stderr) == (1, 1, b"")


def test_a_disk_that_is_full(tiny, image_file):
    with open("/dev/full", "w") as full, Command(*line(tiny, image_file), stdout=full.fileno()) as command:
        assert_one_line(command.finish(), "No space left on device")


def test_a_terminal_that_cannot_show_every_character(tiny, image_file):
    args = line(tiny, image_file, "--no-sample", "--json", prompt="猫")
    done = run(*args, env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert json.loads(done.text)["prompt"] == "猫"  # printed as \u732b, which JSON decodes
    assert done.out.isascii()


# Starting.


OPTIONS = {  # option -> a part of its help, such as the default
    "--model": "google/paligemma-3b-pt-224", "--image": "", "--prompt": "", "--max-new-tokens": "100",
    "--temperature": "0.8", "--top-p": "0.9", "--seed": "", "--device": "cuda", "--dtype": "bfloat16",
    "--no-sample": "", "--backend": "reference", "--revision": "bfloat16", "--json": "", "--task": "",
    "--lang": "en", "--draw": "", "--masks": "", "--mask-decoder": "vae-oid.npz", "--bins": "1024",
}  # fmt: skip


def test_help_names_every_option():
    done = real("--help")
    assert done.returncode == 0
    text = done.stdout.decode()
    for option, default in OPTIONS.items():
        paragraph = re.search(rf"^  {option}\b.*(\n {{3,}}.*)*", text, re.MULTILINE)
        assert paragraph, option
        assert default in paragraph[0], option


def test_help_and_the_package_import_neither_torch_nor_numpy():
    probe = """if True:
        import sys, paligemma, paligemma.config, paligemma.generate
        try:
            paligemma.generate.main(["--help"])
        except SystemExit:
            pass
        sys.exit(bool({"torch", "numpy", "PIL", "huggingface_hub"} & set(sys.modules)))
    """
    assert in_bash('"$@" > /dev/null', sys.executable, "-c", probe).returncode == 0


# Wrong usage.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "nan"], "--temperature: 'nan' is not 0 (greedy) or a positive number"),
        (["--temperature", "inf"], "--temperature: 'inf'"),
        (["--temperature=-1"], "--temperature: '-1'"),
        (["--temperature", "warm"], "--temperature: 'warm'"),
        (["--top-p", "0"], "--top-p: '0' is not above 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p: '1.5'"),
        (["--top-p", "nan"], "--top-p: 'nan'"),
        (["--max-new-tokens", "0"], "--max-new-tokens: '0' is not a whole number of at least 1"),
        (["--max-new-tokens", "2.5"], "--max-new-tokens: '2.5'"),
        (["--seed=-1"], "--seed: '-1' is not a whole number of at least 0"),
        (["--seed", "x"], "--seed: 'x'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--backend", "jax"], "--backend: invalid choice: 'jax'"),
        (["--backend", "reference", "--device", "cuda"], "--backend reference computes on the CPU"),
        (["--prompt", b"\xff"], r"--prompt: '\udcff' is not UTF-8 text"),
        (["--model", ""], "--model is empty: give a value, or leave the option out"),
        (["--adapter="], "--adapter is empty: give a value, or leave the option out"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_usage(tiny, image_file, args, message):
    assert_one_line(run(*line(tiny, image_file, *args)), message, "--help", code=2)


@pytest.mark.parametrize("missing", ["--image", "--prompt"])
def test_an_option_that_is_required(tiny, image_file, missing):
    args = line(tiny, image_file)
    del args[args.index(missing) : args.index(missing) + 2]
    assert_one_line(run(*args), f"the following arguments are required: {missing}", code=2)


# Faults, each of them one line.


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def rewrite(directory: Path, change) -> None:
    """Rewrite the checkpoint as one file, after `change(tensors)`."""
    tensors = {name: tensor for shard in shards(directory) for name, tensor in load_file(shard).items()}
    drop_weights(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(path: Path, part: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * part))


def set_index(d: Path, value: object) -> None:
    edit_json(d / INDEX, lambda index: index["weight_map"].update({NORM: value}))


INDEX, SECOND = "model.safetensors.index.json", "model-00002-of-00003.safetensors"
NOT_WHOLE = f"{SECOND} is not a whole safetensors file"


def drop_weights(d: Path) -> None:
    for path in [*shards(d), d / INDEX]:
        path.unlink()


def set_norm(d: Path, value: torch.Tensor, name: str = NORM) -> None:
    rewrite(d, lambda tensors: tensors.update({name: value}))


def fill_norm(d: Path, value: float) -> None:
    rewrite(d, lambda tensors: tensors[NORM].fill_(value))


def double_norm(d: Path) -> None:
    rewrite(d, lambda tensors: tensors.update({rename(NORM, "model prefix"): tensors[NORM].clone()}))


def set_config(d: Path, **values: object) -> None:
    edit_json(d / "config.json", lambda config: config.update(values))


def set_decoder(d: Path, **values: object) -> None:
    edit_json(d / "config.json", lambda config: config["text_config"].update(values))


def only_tokenizer_json(d: Path) -> None:
    (d / "tokenizer.model").unlink()
    (d / "tokenizer.json").write_text("{}")


def directory_for_tokenizer(d: Path) -> None:
    (d / "tokenizer.model").unlink()
    (d / "tokenizer.model").mkdir()


def set_size(d: Path, size: int) -> None:
    edit_json(d / "preprocessor_config.json", lambda settings: settings.update(size=size))


INTEGERS = torch.zeros(88, dtype=torch.int32)
NO_CONFIG = "has no config.json: it is not the directory of a checkpoint"
NO_TOKENIZER = "has no tokenizer.model and no tokenizer.json"
NO_MAP = "model.safetensors.index.json has no weight_map"
DAMAGE = {
    "shard cut off": (lambda d: truncate(shards(d)[1]), NOT_WHOLE),
    "shard empty": (lambda d: truncate(shards(d)[1], 0), NOT_WHOLE),
    "shard of text": (lambda d: shards(d)[1].write_text("<html>not found</html>"), NOT_WHOLE),
    "shard missing": (lambda d: shards(d)[2].unlink(), "lacks the shard model-00003-of-00003.safetensors"),
    "shards and index missing": (drop_weights, "has no model.safetensors"),
    "tensor missing": (lambda d: rewrite(d, lambda t: t.pop(NORM)), f"1 missing ({NORM})"),
    "tensor unknown": (lambda d: set_norm(d, torch.zeros(1), "extra"), "1 unexpected (extra)"),
    "tensor misshapen": (
        lambda d: set_norm(d, torch.zeros(7)),
        f"tensor '{NORM}' has shape (7,); config.json asks for (88,)",
    ),
    "tensor doubled": (double_norm, "is the same parameter as"),
    "tensor of integers": (lambda d: set_norm(d, INTEGERS), f"tensor '{NORM}' is I32"),
    "weights with NaN": (lambda d: fill_norm(d, np.nan), f"the weights {NORM} hold NaN"),
    "weights with infinity": (lambda d: fill_norm(d, np.inf), f"the weights {NORM} hold NaN or infinity"),
    "index with a path": (lambda d: set_index(d, "../x.safetensors"), "names the file '../x.safetensors'"),
    "index with a number": (lambda d: set_index(d, 3), "names the file '3'"),
    "index that lies": (
        lambda d: set_index(d, "model-00001-of-00003.safetensors"),
        f"does not hold tensor '{NORM}'",
    ),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), NO_MAP),
    "another model": (lambda d: set_config(d, model_type="llava"), "model_type is 'llava'"),
    "another decoder": (lambda d: set_decoder(d, model_type="gemma3"), "model_type is 'gemma3'"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "config not text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe"),
        "config.json cannot be read as JSON",
    ),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json does not hold a JSON object",
    ),
    "config missing": (lambda d: (d / "config.json").unlink(), NO_CONFIG),
    "tokenizer missing": (lambda d: (d / "tokenizer.model").unlink(), NO_TOKENIZER),
    "tokenizer cut off": (lambda d: truncate(d / "tokenizer.model"), "tokenizer.model is not a"),
    "tokenizer a directory": (directory_for_tokenizer, "tokenizer.model"),
    "tokenizer.json damaged": (only_tokenizer_json, "tokenizer.json"),
    "preprocessor of another size": (lambda d: set_size(d, 7), "size is 7"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(copy, image_file, damage):
    change, message = DAMAGE[damage]
    change(copy)
    assert_one_line(run(*line(copy, image_file)), message)


@pytest.mark.parametrize("damage", ["shard cut off", "tensor missing", "config not JSON", "another decoder"])
def test_the_reference_refuses_the_same_checkpoints(copy, image_file, damage):
    change, message = DAMAGE[damage]
    change(copy)
    assert_one_line(run(*line(copy, image_file, "--backend", "reference")), message)


def test_the_undamaged_checkpoint_is_accepted(copy, image_file):
    """Otherwise the tests above would prove nothing; in shards, and in one file."""
    assert run(*line(copy, image_file)).code == 0
    rewrite(copy, lambda tensors: None)
    assert run(*line(copy, image_file)).code == 0


def test_a_damaged_checkpoint_in_a_process_of_its_own(copy, image_file):
    change, message = DAMAGE["shard cut off"]
    change(copy)
    done = real(*line(copy, image_file))
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr.decode())


@pytest.mark.parametrize(
    "model", ["nowhere", "./nowhere", "/no/such/directory", "~nobody-of-this-name/model", "a file"]
)
def test_a_model_that_is_not_there(image_file, tmp_path, model):
    if model == "a file":
        model = tmp_path / "model.txt"
        model.touch()
    assert_one_line(run(*line(model, image_file)), f"{model} is neither a directory nor a hub id")


def test_a_revision_of_a_directory(tiny, image_file):
    done = run(*line(tiny, image_file, "--revision", "main"))
    assert_one_line(done, "is a directory, which has no revision 'main'")


def bad_image(kind: str, path: Path) -> None:
    if kind == "truncated":
        Image.effect_noise((64, 64), 90).save(path)
        truncate(path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot be read as an image"),
        ("text", "is not in an image format that Pillow reads"),
        ("empty", "is empty: it has 0 bytes"),
        ("directory", "cannot be read"),
        ("missing", "there is no such file"),
    ],
)
def test_an_image_that_cannot_be_read(tiny, tmp_path, kind, message):
    path = tmp_path / "image.png"
    bad_image(kind, path)
    assert_one_line(run(*line(tiny, path)), path, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the image is empty: it has 0 bytes"), (b"no image", "is not in an image format")],
)
def test_a_stdin_that_is_no_image(tiny, content, message):
    assert_one_line(run(*line(tiny, "-"), stdin=content), message)


def test_a_stdin_that_is_closed(tiny):
    done = in_bash('"$@" <&-', *COMMAND, *line(tiny, "-"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"error: --image - reads the image from stdin, which is closed\n"


@pytest.fixture(scope="module")
def short(tmp_path_factory, tokenizer_model) -> Path:
    """A checkpoint with a context of 30 tokens, 16 of them for the image."""
    config, directory = config_dict(text={"max_position_embeddings": 30}), tmp_path_factory.mktemp("short")
    weights = random_weights(config)
    return write_checkpoint(directory / "model", tokenizer_model, config=config, weights=weights)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_prompt_beyond_the_context(short, image_file, backend):
    args = ["--no-sample", "--backend", backend]
    done = run(*line(short, image_file, *args, prompt="cat dog " * 20))
    assert_one_line(done, "the prompt is", "at most 14")
    assert run(*line(short, image_file, *args, "--max-new-tokens", 2)).code == 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("tokens", [100, 10**30])
def test_an_answer_beyond_the_context(short, image_file, tokens, backend):
    done = run(*line(short, image_file, "--max-new-tokens", tokens, "--backend", backend))
    assert_one_line(done, "this model has 30", "lower max_new_tokens")


def test_an_answer_beyond_the_memory(tmp_path, tokenizer_model, image_file):
    """The cache needs 98,304 bytes for each position, in all more than an address space has."""
    text = {"max_position_embeddings": 2**31 - 1, "num_key_value_heads": 4, "head_dim": 1024}
    config = config_dict(text=text)
    weights = random_weights(config)
    model = write_checkpoint(tmp_path / "model", tokenizer_model, config=config, weights=weights)
    assert_one_line(run(*line(model, image_file, "--max-new-tokens", 2 * 10**9)), "out of memory")


def test_a_gpu_that_is_not_there(tiny, image_file):
    assert_one_line(run(*line(tiny, image_file, "--device", "cuda")), "cuda", "use cpu")


def test_kernels_without_a_gpu(tiny, image_file):
    assert_one_line(run(*line(tiny, image_file, "--backend", "triton")), "backend triton needs a CUDA GPU")


def test_what_limits_a_token_is_told_where_it_is_memory():
    from paligemma.engines import Engine
    from paligemma.timings import measured, summary

    large = Engine(iter(()), [], None, 5_000_000_000, lambda: 0.25, lambda: 25.0, lambda: 40_000_000)
    timings = measured(10.0, 10.5, [11.5, 11.9, 12.3, 12.7], large)
    assert timings == {
        "load_s": 0.5, "first_token_s": 1.0, "new_tokens": 4, "vision_s": 0.25, "ms_per_token": 400.0,
        "tokens_per_s": 2.5, "weights_gb_per_s": 12.5, "machine_gb_per_s": 25.0, "held_gb": 0.04,
    }  # fmt: skip
    assert summary(timings) == (
        "load 0.50 s, first token 1.00 s (vision 0.25 s), 4 tokens, 400.00 ms each (12.5 GB/s of weights, "
        "50% of the 25.0 that this machine reads), cache and graphs 0.04 GB"
    )
    told = summary(measured(0.0, 1.0, [3.0], Engine(iter(()), [], None)))
    assert told == "load 1.00 s, first token 2.00 s, 1 token"
    tiny = Engine(iter(()), [], None, 0, lambda: 0.001, None, lambda: 40_000)
    told = summary(measured(0.0, 1.0, [3.0, 3.5], tiny))
    assert told == "load 1.00 s, first token 2.00 s, 2 tokens, 500.00 ms each"


@pytest.mark.parametrize("url", ["https://example.com/a b.jpg", "HTTP://example.com/a.jpg"])
def test_a_url_is_not_fetched(tiny, url):
    quoted = f"'{url}'" if " " in url else url
    piped = f"curl -fL {quoted} | python -m paligemma.generate --image - ..."
    assert_one_line(run(*line(tiny, url)), f"URLs are not fetched; pipe it: {piped}")
