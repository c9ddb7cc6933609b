"""The command line with a model of the hub: huggingface_hub downloads it from a server on this machine."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import config_dict, random_weights, write_checkpoint
from command_line import ROOT, Command, Finished, assert_one_line, environment, run, wait_for
from hub_server import Hub, close, commit, reset, stall
from safetensors.torch import save_file

NAME = "someone/model"
SIDE_FILES = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model"}
SIDE_FILES |= {"tokenizer_config.json"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
INDEX = "model.safetensors.index.json"
# Files that are not needed.
CLUTTER = {
    "README.md": b"# model", ".gitattributes": b"*.bin", "pytorch_model.bin": b"pickle",
    "tokenizer.json": b"{}", "chat_template.jinja": b"",
}  # fmt: skip
TOKENIZER_CONFIG = {"tokenizer_config.json": b'{"added_tokens_decoder": {}}'}
UNLISTED = {"model-00003-of-00003.safetensors": b"left by an earlier upload"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer_model) -> dict[str, Path]:
    """The revisions of a repository as Google publishes them. Each has its own weights, so that the answer
    tells which one was read."""
    directory, revisions = tmp_path_factory.mktemp("revisions"), {}
    dtypes = {"main": "float32", "bfloat16": "bfloat16", "other": "float16"}
    for seed, (name, dtype) in enumerate(dtypes.items()):
        weights = random_weights(config_dict(), seed)
        options = {"weights": weights, "dtype": dtype, "shards": 2}
        revisions[name] = write_checkpoint(directory / name, tokenizer_model, **options)
    return revisions


@pytest.fixture(scope="module")
def answers(checkpoints, image_file) -> dict[str, str]:
    return {name: run("--model", path, *question(image_file)).text for name, path in checkpoints.items()}


@pytest.fixture(scope="module", params=[["main", "bfloat16"], ["main"]], ids=" and ".join)
def downloaded(request, checkpoints, image_file, tmp_path_factory) -> tuple[dict, Path]:
    """A repository that was downloaded once: its revisions, and the HF_HOME that has it."""
    home = tmp_path_factory.mktemp("downloaded")
    with Hub() as hub:
        hub.repositories[NAME] = {name: contents(checkpoints[name]) for name in request.param}
        assert run("--model", NAME, *question(image_file), env=settings(hub, home)).code == 0
        return hub.repositories[NAME], home


@pytest.fixture
def hub(checkpoints):
    with Hub() as hub:
        hub.repositories[NAME] = {
            name: contents(path) | TOKENIZER_CONFIG | CLUTTER | UNLISTED for name, path in checkpoints.items()
        }
        yield hub


@pytest.fixture
def ask(hub, tmp_path, image_file):
    """The command line with a model of that hub and a cache of its own."""

    def ask(*args: object, start=run, **env: object) -> Finished:
        env = settings(hub, tmp_path / "home") | env
        return start("--model", NAME, *question(image_file), *args, env=env)

    return ask


def settings(hub: Hub, home: Path) -> dict[str, object]:
    off = {"HF_HUB_DISABLE_XET": 1, "HF_HUB_DISABLE_TELEMETRY": 1}
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": 0, "HF_HOME": home, **off}


def question(image_file: Path) -> list[object]:
    return ["--image", image_file, "--prompt", "caption en", "--no-sample", "--max-new-tokens", 2]


def adapter_files(directory: Path, value: float, **config) -> dict[str, bytes]:
    """An adapter of one layer whose factors are `value`; config: more fields of its adapter_config.json."""
    module = "base_model.model.model.language_model.layers.0.mlp.gate_proj"
    shapes = {f"{module}.lora_A.weight": (2, 88), f"{module}.lora_B.weight": (152, 2)}
    weights = directory / "adapter_model.safetensors"
    save_file({name: torch.full(shape, value) for name, shape in shapes.items()}, weights)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}
    return {"adapter_config.json": json.dumps(config).encode(), weights.name: weights.read_bytes()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_answers_tell_the_revisions_apart(answers):
    assert len(set(answers.values())) == 3


def test_only_the_files_that_are_needed_are_fetched(hub, ask, answers):
    hub.repositories[NAME] = {"main": hub.repositories[NAME]["bfloat16"]}
    done = ask()
    assert (done.code, done.text) == (0, answers["bfloat16"])
    assert {file for _, file in hub.fetched()} == SIDE_FILES | SHARDS | {INDEX}


def test_a_model_in_one_file_is_fetched(hub, ask, tmp_path, tokenizer_model, answers):
    weights = random_weights(config_dict(), seed=1)
    single = write_checkpoint(tmp_path / "single", tokenizer_model, weights=weights, dtype="bfloat16")
    hub.repositories[NAME] = {"main": contents(single) | TOKENIZER_CONFIG | CLUTTER}
    assert ask().text == answers["bfloat16"]
    assert {file for _, file in hub.fetched()} == SIDE_FILES | {"model.safetensors"}


def test_an_adapter_is_fetched(hub, ask, tmp_path, answers):
    files = adapter_files(tmp_path, 0.3)
    names = ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json")
    small = {name: hub.repositories[NAME]["main"][name] for name in names}
    clutter = {name: content for name, content in CLUTTER.items() if name != "tokenizer.json"}
    hub.repositories["someone/adapter"] = {"main": files | small | CLUTTER}
    hub.repositories["someone/alone"] = {"main": files | clutter}
    adapted = ask("--adapter", "someone/adapter")
    assert adapted.code == 0
    assert adapted.text != answers["bfloat16"]
    requests = [r.path for r in hub.requests if r.method == "GET"]
    fetched = {path.rsplit("/", 1)[1] for path in requests if "/someone/adapter/resolve/" in path}
    assert fetched == set(files) | set(small)
    assert ask("--adapter", "someone/alone").text == adapted.text
    assert ask("--adapter", "someone/adapter", "--local-files-only").text == adapted.text
    assert_one_line(ask("--adapter", "someone/nothing"), "someone/nothing is not on the hub, or is private")


def test_the_tokenizer_of_an_adapter_is_fetched(hub, ask):
    files = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b""}
    hub.repositories["someone/adapter"] = {"main": files | {"tokenizer.json": b"{}"}}
    assert ask("--adapter", "someone/adapter").code == 1  # its file of weights is empty
    assert [r for r in hub.requests if r.path.endswith("/tokenizer.json") and "/someone/adapter/" in r.path]


def test_files_that_add_tokens_are_fetched(hub, ask):
    """tokenizer.json, which has 17 MB, is fetched only if it may list tokens that no other file lists."""
    files = hub.repositories[NAME]["bfloat16"]
    # Their contents differ: files of equal content are fetched once.
    files |= {"added_tokens.json": b"{}", "special_tokens_map.json": b" {}"}
    done = ask("--revision", "bfloat16")
    assert done.code == 0
    fetched = {file for _, file in hub.fetched()}
    assert {"added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"} <= fetched
    assert "tokenizer.json" not in fetched
    files = hub.repositories[NAME]["other"]
    files["tokenizer_config.json"] = b"{}"
    files["tokenizer.json"] = b'{"added_tokens": [{"id": 5, "content": "<new>"}]}'
    says = "tokenizer.json: the added token '<new>' is 5, but the next free id"
    assert_one_line(ask("--revision", "other"), says)
    assert "tokenizer.json" in {file for _, file in hub.fetched()}


def test_tokenizer_json_is_fetched_if_there_is_no_tokenizer_model(hub, ask):
    del hub.repositories[NAME]["bfloat16"]["tokenizer.model"]
    done = ask("--revision", "bfloat16")
    assert_one_line(done, "tokenizer.json", "add the checkpoint's tokenizer.model")  # it is only "{}"
    assert ("bfloat16", "tokenizer.json") in hub.fetched()


@pytest.mark.parametrize(
    ("args", "revision"),
    [
        ([], "bfloat16"),
        (["--dtype", "bfloat16"], "bfloat16"),
        (["--dtype", "float32"], "main"),
        (["--dtype", "float16"], "main"),  # there is no revision float16
        (["--backend", "reference", "--dtype", "float32"], "main"),
        (["--revision", "main"], "main"),
        (["--revision", "other"], "other"),
        (["--revision", commit(NAME, "other")], "other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_weights_of_one_revision_are_fetched(hub, ask, answers, args, revision):
    done = ask(*args)
    assert (done.code, done.text) == (0, answers[revision])
    weights = {(r, file) for r, file in hub.fetched() if file.endswith(".safetensors")}
    assert weights == {(revision, shard) for shard in SHARDS}


def test_main_serves_if_there_is_no_branch_for_the_dtype(hub, ask, answers):
    hub.repositories[NAME] = {"main": hub.repositories[NAME]["main"]}
    assert ask().text == answers["main"]


def test_a_repository_in_bfloat16_is_not_asked_for_a_branch(hub, ask):
    files = hub.repositories[NAME]
    hub.repositories[NAME] = {"main": files["bfloat16"], "bfloat16": files["main"]}
    ask()
    assert {revision for revision, _ in hub.fetched()} == {"main"}


WITHOUT_THE_HUB = ["HF_HUB_OFFLINE", "--local-files-only", "no server", "no service", "no access"]


@pytest.mark.parametrize("how", WITHOUT_THE_HUB)
def test_what_was_downloaded_once_is_used_without_the_hub(hub, ask, answers, downloaded, how):
    hub.repositories[NAME], home = downloaded
    if how == "no service":
        hub.answer("/", 503)
    elif how == "no access":
        hub.answer("/", 401, "GatedRepo")
    args = ["--local-files-only"] if how == "--local-files-only" else []
    env = {"HF_HUB_OFFLINE": {"HF_HUB_OFFLINE": 1}, "no server": {"HF_ENDPOINT": nobody()}}.get(how, {})
    done = ask(*args, HF_HOME=home, **env)
    assert (done.code, done.text) == (0, answers[list(hub.repositories[NAME])[-1]]), done.err
    if how in ("HF_HUB_OFFLINE", "--local-files-only"):
        assert not hub.requests
    else:
        assert done.err.count("\n") == 2  # one such line, and the timings
        reason = "(cannot be reached|answers 503|answers 401)"
        assert re.match(rf"{NAME} is taken from the cache: the hub {reason}\n", done.err)


def test_nothing_is_fetched_twice(hub, ask, downloaded):
    hub.repositories[NAME], home = downloaded
    assert ask(HF_HOME=home).code == 0
    assert not hub.fetched()


def test_a_token_is_sent_to_the_hub(hub, ask):
    ask(HF_TOKEN="hf_secret")
    sent = {(r.path.startswith("/cdn"), r.headers.get("authorization")) for r in hub.requests}
    assert sent == {(False, "Bearer hf_secret"), (True, None)}


def test_a_gated_repository_names_its_licence(hub, ask):
    # Its description is public, its files are not.
    hub.answer(f"/{NAME}/resolve", 403, "GatedRepo", "Access to model is restricted")
    assert_one_line(ask(), f"{NAME} is gated", f"https://huggingface.co/{NAME}", "hf auth login")


def test_a_gated_repository_whose_description_is_not_public_does_too(hub, ask):
    hub.answer(f"/api/models/{NAME}", 403, "GatedRepo", "Access to model is restricted")
    assert_one_line(ask(), f"{NAME} is gated", f"https://huggingface.co/{NAME}", "hf auth login")


@pytest.mark.parametrize("status", [401, 404])  # without and with a token
def test_a_missing_repository(hub, ask, status):
    hub.answer(f"/api/models/{NAME}", status, "RepoNotFound")
    assert_one_line(ask(), f"{NAME} is not on the hub, or is private", "check the name", "HF_TOKEN")


def test_a_missing_revision(ask):
    see = f"https://huggingface.co/{NAME}/tree/main"
    assert_one_line(ask("--revision", "nope"), f"{NAME} has no revision 'nope'", see)


def test_a_token_that_is_not_valid(hub, ask):
    hub.answer("/", 401, message="Invalid credentials in Authorization header")
    assert_one_line(ask(HF_TOKEN="hf_old"), f"the hub answers 401 for {NAME}", "check HF_TOKEN")


def test_a_token_without_the_right(hub, ask):
    hub.answer("/", 403, message="your token lacks a permission")
    assert_one_line(ask(HF_TOKEN="hf_narrow"), f"the hub answers 403 for {NAME}", "check HF_TOKEN")


def test_a_hub_out_of_order(hub, ask):
    hub.answer("/api/models", 500)
    assert_one_line(ask(), f"the hub answers 500 for {NAME}", "try again later")


def test_something_else_than_a_hub(hub, ask):
    hub.answer("/", 200, body=b"<html>Welcome to our hotel</html>")
    assert_one_line(ask(), NAME, "cannot be reached", "network connection")


def test_no_server_and_nothing_in_the_cache(ask):
    done = ask(HF_ENDPOINT=nobody())
    assert_one_line(done, NAME, "not complete in the cache", "cannot be reached", "network connection")


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "--local-files-only"])
def test_no_download_wanted_and_nothing_in_the_cache(hub, ask, how):
    done = ask(*[how] * how.startswith("-"), HF_HUB_OFFLINE=int(not how.startswith("-")))
    options = "--local-files-only and HF_HUB_OFFLINE"
    assert_one_line(done, NAME, "not complete in the cache", "downloads are switched off", options)
    assert not hub.requests


def test_a_disk_too_small_is_found_before_the_weights_are_fetched(hub, ask, tmp_path):
    hub.sizes = dict.fromkeys(SHARDS, 10**18)
    assert_one_line(ask(), f"{NAME} needs 2000000000.0 GB more", str(tmp_path / "home"), "GB free", "HF_HOME")
    assert not [file for _, file in hub.fetched() if file in SHARDS]


def test_a_cache_that_cannot_be_written(hub, ask, tmp_path):
    (tmp_path / "file").touch()
    done = ask(HF_HUB_CACHE=tmp_path / "file" / "cache")
    assert_one_line(done, "file/cache", "cannot be written", "HF_HOME")


NOT_PLAIN = [
    "../../../home/x.safetensors",
    "/etc/x.safetensors",
    "model.bin",
    "..\\x.safetensors",
    "*.safetensors",
]


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_an_index_must_name_plain_files(hub, ask, name):
    files = hub.repositories[NAME]["bfloat16"]
    index = json.loads(files[INDEX])
    index["weight_map"]["language_model.model.norm.weight"] = name
    files[INDEX] = json.dumps(index).encode()
    assert_one_line(ask(), f"{INDEX} names the file", repr(name))
    assert not [file for _, file in hub.fetched() if file.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize("args", [[], ["--dtype", "float32"], ["--revision", "main"]], ids=" ".join)
def test_another_decoder_is_refused_before_its_weights_are_fetched(hub, ask, args):
    config = config_dict(text={"model_type": "gemma3"}, torch_dtype="bfloat16")
    hub.repositories[NAME]["main"]["config.json"] = json.dumps(config).encode()
    assert_one_line(ask(*args), "text_config.model_type is 'gemma3', which is not implemented")
    assert {file for _, file in hub.fetched()} <= SIDE_FILES | {INDEX}


def test_a_repository_without_config_is_refused(hub, ask):
    hub.repositories[NAME] = {"main": CLUTTER}
    done = ask()
    assert (done.code, done.out) == (1, b"")
    last = done.err.splitlines()[-1]  # after two warnings of huggingface_hub
    holds = "it holds pytorch_model.bin, a pickle, which is never opened: convert it to safetensors"
    assert last == f"error: {NAME} has no config.json: it is not the directory of a checkpoint; {holds}"


OTHER_REPOSITORIES = {
    "an adapter": (
        {"adapter_config.json": b'{"base_model_name_or_path": "google/x"}',
         "adapter_model.safetensors": b"", "training_args.bin": b""},
        f"{NAME} holds an adapter and no model: "
        f"give the model that it was trained on as well: --model google/x --adapter {NAME}",
    ),
    "GGUF": (
        {"x-Q4.gguf": b""},
        f"{NAME} has no config.json: it is not the directory of a checkpoint; "
        "it holds x-Q4.gguf, a GGUF file",
    ),
    "Google's format": (
        {"README.md": b"", "paligemma-3b-pt-224.bf16.npz": b"x"},
        f"format: run 'hf download {NAME} paligemma-3b-pt-224.bf16.npz' and give the path that it prints",
    ),
    "folders": (
        {"a/config.json": b"{}", "b/config.json": b"{}"},
        "download the repository and give b of it (or one of 1 others beside it)",
    ),
    "no weights": (
        {"config.json": json.dumps(config_dict()).encode(), "model.ckpt": b""},
        f"{NAME} has no model.safetensors and no model.safetensors.index.json; it",
    ),
    "ColPali": (
        {"config.json": b'{"model_type": "colpali"}'},
        f"{NAME} is not a PaliGemma checkpoint: its config.json has model_type 'colpali'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_REPOSITORIES)
def test_the_error_for_another_repository_says_what_it_is(hub, ask, kind):
    files, message = OTHER_REPOSITORIES[kind]
    hub.repositories[NAME] = {"main": files}
    done = ask()
    assert (done.code, done.out) == (1, b"")
    assert message in done.err.splitlines()[-1]  # after warnings of huggingface_hub
    weights = (".safetensors", ".bin", ".gguf", ".ckpt")
    assert not [file for _, file in hub.fetched() if file.endswith(weights)]


def test_shards_are_fetched_without_an_index(hub, ask, answers):
    files = hub.repositories[NAME]["bfloat16"]
    del files[INDEX], files[min(UNLISTED)]
    assert ask("--revision", "bfloat16").text == answers["bfloat16"]


@pytest.mark.parametrize("revision", [None, "other"])
def test_the_base_model_of_an_adapter_is_fetched(hub, ask, tmp_path, image_file, answers, revision):
    files = adapter_files(tmp_path, 0.0, base_model_name_or_path=NAME, revision=revision)
    hub.repositories["someone/adapter"] = {"main": files}
    done = run("--adapter", "someone/adapter", *question(image_file), env=settings(hub, tmp_path / "home"))
    assert (done.code, done.text) == (0, answers[revision or "bfloat16"])


def test_a_shard_that_the_repository_lacks_is_named(hub, ask):
    del hub.repositories[NAME]["bfloat16"][min(SHARDS)]
    assert_one_line(ask(), f"lacks the shard {min(SHARDS)}")


def test_a_lost_connection_is_one_line_and_the_next_run_fetches_the_rest(hub, ask, answers):
    hub.break_off(max(SHARDS), reset)
    done = ask("--revision", "main")
    assert_one_line(done, f"the download of {NAME} broke off", "run the same command again")
    before = hub.fetched()
    assert ("main", max(SHARDS)) in before
    hub.requests.clear()
    assert ask("--revision", "main").text == answers["main"]
    # The side files and the complete shards are in the cache.
    assert {file for _, file in hub.fetched()} <= SHARDS


def test_a_server_that_hangs_up_half_way_is_asked_again(hub, ask, answers):
    hub.break_off(max(SHARDS), close)
    done = ask("--revision", "main")
    assert (done.code, done.text) == (0, answers["main"])
    assert len([r for r in hub.requests if r.method == "GET" and r.path.endswith(max(SHARDS))]) == 2


def test_control_c_twice_ends_a_download_at_once(hub, ask, answers):
    hub.break_off(max(SHARDS), stall)
    with ask("--revision", "main", start=Command, HF_HUB_DOWNLOAD_TIMEOUT=60) as command:
        wait_for(lambda: ("main", max(SHARDS)) in hub.fetched())
        started = time.monotonic()
        command.interrupt()  # after one interrupt, huggingface_hub finishes the files that have begun
        time.sleep(0.5)  # without a pause, the two signals would be one
        command.interrupt()
        done = command.finish()
    assert (done.code, done.out, done.err) == (130, b"", "")
    assert time.monotonic() - started < 20  # seconds; the server stalls for 60
    assert ask("--revision", "main").text == answers["main"]


NOT_HUB_IDS = [
    "a--b/c",
    "a/b.git",
    "a/.b",
    "-a/b",
    "a/" + "b" * 100,
    "a/b/c",
    "just-a-name",
    "./a/b",
    "a b/c",
]


@pytest.mark.parametrize("name", [*NOT_HUB_IDS, "~nobody-of-this-name/model"])
def test_a_name_that_is_not_a_hub_id(hub, ask, name):
    assert_one_line(ask("--model=" + name), name, "neither a directory nor a hub id")
    assert not hub.requests


def nobody() -> str:
    """An address at which no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        return f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.mark.parametrize("stream", ["None", "io.StringIO()"], ids=["none", "closed"])
def test_a_download_and_its_notices_whatever_stderr_is(hub, tmp_path, stream):
    """In a service that has no stderr, the first run downloads with progress bars; in the second run the hub
    cannot be reached."""
    code = f"import io, sys\nsys.stderr = {stream}\nsys.stderr and sys.stderr.close()\n"
    code += f"from paligemma.checkpoint import hub\nprint(hub.resolve({NAME!r}))"
    found = []
    for endpoint in (hub.url, "http://127.0.0.1:9"):
        env = environment(**settings(hub, tmp_path / "home") | {"HF_ENDPOINT": endpoint})
        command = ["bash", "-c", '"$@" 2>&-', "bash", sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        found.append(done.stdout.decode().splitlines())
    assert found[0] == found[1]
    assert [(Path(line) / "tokenizer.model").exists() for line in found[0]] == [True]
