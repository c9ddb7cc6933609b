"""The server: its answers are those of the command line, and whatever a client sends, it goes on."""

import asyncio
import base64
import io
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import command_line
import httpx
import hypothesis
import openai
import pytest
import schemathesis
import torch
import uvicorn
from command_line import assert_one_line, wait_for
from conftest import ROOT
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase
from masks import write_npz
from PIL import Image
from pydantic import ValidationError
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from servers import CHAT, HTTP, LONG, Process, body, counted, data_url, events, head, place, raw, thread

from paligemma import PaliGemmaError, demo, load_hf_model
from paligemma.answers.masks import MaskDecoder
from paligemma.model import PaliGemma
from paligemma.rows import Rows
from paligemma.serve import api_key
from paligemma.serving import server as serving
from paligemma.serving.app import create_app
from paligemma.serving.engine import Engine
from paligemma.serving.gate import Traffic
from paligemma.serving.question import FORMATS
from paligemma.serving.request import ChatRequest
from paligemma.serving.response import Chunk, Completion
from paligemma.serving.settings import Settings
from paligemma.serving.text import StoppedText

SHAPES, STARS = demo.SAMPLES / "shapes.png", demo.SAMPLES / "stars.png"
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
CASES = {
    "a box": ("detect red circle", [SHAPES], {}),
    "several boxes": ("detect star", [STARS], {}),
    "a caption": ("caption en", [STARS], {}),
    "sampled": ("caption en", [SHAPES], SAMPLED),
    "cut off": ("caption en", [SHAPES], {"max_tokens": 3}),
    "two pictures": ("answer en are both pictures the same?", [SHAPES, STARS], {}),
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with Process(tmp_path_factory.mktemp("serve") / "stderr", "--dtype", "float32") as server:
        yield server.address


@pytest.fixture(scope="module")
def loaded():
    return load_hf_model("demo", dtype="float32")


@pytest.fixture
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


def post(address: str, sent: dict | bytes, **options) -> httpx.Response:
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return HTTP.post(f"{address}{CHAT}", content=content, headers=headers, **options)


def answered(address: str) -> bool:
    """Whether the server answers a usual request."""
    return post(address, body("detect red circle", SHAPES)).json()["choices"][0]["finish_reason"] == "stop"


def error_of(done: httpx.Response) -> dict:
    """The error of a response, which has OpenAI's shape."""
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


# Answers


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_that_of_the_command_line(client, name):
    prompt, pictures, options = CASES[name]
    args = ["--no-sample"] if not options.get("temperature") else []
    for option, value in options.items():
        args += [f"--{option.replace('max_tokens', 'max_new_tokens').replace('_', '-')}", value]
    line = (
        "--model",
        "demo",
        "--dtype",
        "float32",
        "--image",
        *pictures,
        "--prompt",
        prompt,
        "--json",
        *args,
    )
    theirs = json.loads(command_line.run(*line).text)
    sent = body(prompt, *pictures, logprobs=True, **options)
    done = client.chat.completions.create(**sent)
    choice = done.choices[0]
    assert choice.message.content == theirs["text"]
    assert choice.finish_reason == theirs["finish_reason"]
    assert [{k: v for k, v in o.items() if k != "mask"} for o in choice.objects] == theirs["objects"]
    assert choice.faults == theirs["faults"]
    assert done.usage.completion_tokens == len(theirs["tokens"])
    width, height = Image.open(pictures[0]).size
    assert done.image_size == {"width": width, "height": height}
    tokens = choice.logprobs.content
    assert "".join(t.token for t in tokens) == choice.message.content
    assert [round(t.logprob, 4) for t in tokens] == [round(v, 4) for v in theirs["log_probs"][: len(tokens)]]
    assert len(theirs["tokens"]) - len(tokens) == (choice.finish_reason == "stop")  # the end token

    *chunks, last, use = client.chat.completions.create(
        **sent, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == choice.message.content
    streamed = [t for chunk in chunks for t in chunk.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in tokens]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * len(chunks)
    assert last.choices[0].finish_reason == choice.finish_reason
    assert last.choices[0].objects == choice.objects
    assert last.image_size == done.image_size
    assert last.timings.keys() == done.timings.keys()
    assert (use.choices, use.usage) == ([], done.usage)


def test_responses_are_those_that_the_description_promises(address):
    sent = body("detect star", STARS, logprobs=True)
    Completion.model_validate(post(address, sent).json(), extra="forbid")
    chunks = events(post(address, sent | {"stream": True}).iter_lines())
    assert len(chunks) > 10
    for chunk in chunks:
        Chunk.model_validate(chunk, extra="forbid")
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_sixteen_at_once_have_the_answers_that_each_has_alone(address):
    prompts = ("detect star", "caption en", "detect red circle", "detect blue square ; green triangle")
    pictures = sorted(demo.SAMPLES.glob("*.png"))
    asked = [body(prompt, picture) for prompt in prompts for picture in pictures]
    alone = [post(address, sent).json()["choices"] for sent in asked]
    with ThreadPoolExecutor(16) as pool:
        together = [done.json()["choices"] for done in pool.map(lambda sent: post(address, sent), asked)]
    assert len(alone) == 16
    scores = [taken_scores(answers) for answers in (together, alone)]
    assert together == alone
    assert len(scores[0]) > 16  # of several objects
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # products of several rows are rounded otherwise


def taken_scores(answers: list) -> list[float]:
    """Take the scores out of answers."""
    objects = [found for choices in answers for choice in choices for found in choice["objects"]]
    return [found.pop(name) for found in objects for name in ("score", "box_score", "label_score")]


def test_rows_are_decoded_together(loaded, monkeypatch):
    """Not one after another: while a long answer is made, a short one joins and ends."""
    slow(monkeypatch, 0.01)
    with thread(*loaded, batch_size=2) as (address, app), ThreadPoolExecutor(1) as pool:
        long = pool.submit(post, address, body("caption en", SHAPES, **LONG))
        wait_for(lambda: app.state.service.engine.running == 1)
        assert answered(address)
        assert not long.done()
        assert long.result().json()["usage"]["completion_tokens"] == LONG["max_tokens"]


def test_masks_are_pngs_of_the_picture(loaded, tmp_path, monkeypatch):
    model, processor = loaded
    decoder = MaskDecoder.load(write_npz(tmp_path / "vae-oid.npz"))
    codes = "".join(f"<seg{n:03}>" for n in range(16))
    ids = processor.tokenizer.encode(f"<loc0100><loc0200><loc0700><loc0800>{codes} cat")
    monkeypatch.setattr(Rows, "_append", forced(Rows._append, [*ids, *processor.tokenizer.eos_token_ids]))
    with thread(model, processor, mask_decoder=decoder) as (address, _):
        (found,) = post(address, body("segment cat", SHAPES)).json()["choices"][0]["objects"]
    assert found["label"] == "cat"
    mask = Image.open(io.BytesIO(base64.b64decode(found["mask"].partition(",")[2])))
    assert (mask.mode, mask.size) == ("L", Image.open(SHAPES).size)
    own = processor.parse(ids, mask.size, mask_decoder=decoder).objects[0].mask
    assert 0 < own.sum() < own.size
    assert mask.tobytes() == (own * 255).astype("uint8").tobytes()


def forced(append, ids: list[int]):
    """Rows._append, with these tokens instead of the model's."""
    return lambda self, row, token, *rest: append(self, row, ids[len(row.tokens)], *rest)


def test_a_stop_text_ends_the_answer_before_it(client):
    sent = body("detect red circle", SHAPES)
    full = client.chat.completions.create(**sent).choices[0].message.content
    assert full.endswith(" red circle")
    done = client.chat.completions.create(**sent, stop=["nowhere", " circ"]).choices[0]
    assert (done.message.content, done.finish_reason) == (full.removesuffix(" circle"), "stop")
    assert [o["label"] for o in done.objects] == ["red"]
    parts = list(client.chat.completions.create(**sent, stop=" circ", stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == done.message.content


class Words:
    """A stream of tokens, each of which is a text."""

    def __init__(self, words: list[str]):
        self.words = words
        self.tokenizer = type("Tokenizer", (), {"eos_token_ids": (-1,)})

    def push(self, token: int) -> str:
        return self.words[token]

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize("stops", [(), ("ab",), ("aab", "b"), ("aba",), ("abab", "ba"), ("c",)])
def test_stop_texts_are_found_wherever_tokens_end(stops):
    for number in range(3**5):
        text = "".join("abc"[number // 3**n % 3] for n in range(5))
        for cut in range(1 << 4):
            ends = [n + 1 for n in range(4) if cut >> n & 1]
            words = [text[a:b] for a, b in zip([0, *ends], [*ends, 5], strict=True)]
            stopped = StoppedText(Words(words), stops)
            told = ""
            for n in range(len(words)):
                told += "".join(piece.text for piece in stopped.push([n], [0.0], n == len(words) - 1))
                if stopped.stopped:
                    break
            ends_at = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
            assert told == text[: min(ends_at, default=(0, 5))[1]], (words, stops)
            whole = sum(end <= len(told) for end in [*ends, 5])
            assert stopped.count == whole, (words, stops)


# What is refused


def content(value: object) -> dict:
    return {"messages": [{"role": "user", "content": value}]}


# fmt: off
REFUSED = {
    "another model": ({"model": "gpt-4o"}, 404, "model", "gpt-4o"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "tools"),
    "two answers": ({"n": 2}, 400, "n", "one answer"),
    "JSON": ({"response_format": {"type": "json_object"}}, 400, "response_format", "JSON"),
    "audio": ({"audio": {"voice": "a"}}, 400, "audio", "pictures"),
    "a penalty": ({"presence_penalty": 1}, 400, "presence_penalty", "penalties"),
    "other tokens": ({"top_logprobs": 5}, 400, "top_logprobs", "own"),
    "another field": ({"top_k": 5}, 400, "top_k", "top_k"),
    "a field that is no name": ({"\ud800": 5}, 400, None, r"\ud800"),
    "a negative temperature": ({"temperature": -1}, 400, "temperature", "-1"),
    "a temperature that is text": ({"temperature": "hot"}, 400, "temperature", "hot"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "0"),
    "too many tokens": ({"max_tokens": 1025}, 400, "max_tokens", "1024"),
    "more tokens than positions": ({"max_tokens": 1000}, 400, "max_tokens", "512"),
    "two numbers of tokens": ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "differ"),
    "five stop texts": ({"stop": list("abcde")}, 400, "stop", "4"),
    "an empty stop text": ({"stop": ""}, 400, "stop", "empty"),
    "options of no stream": ({"stream_options": {}}, 400, "stream_options", "stream: true"),
    "no message": ({"messages": []}, 400, "messages", "one message"),
    "two messages": ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "messages", "one message"),
    "a system message": (
        {"messages": [{"role": "system", "content": "a"}]},
        400,
        "messages.0.role",
        "system",
    ),
    "no text": (content(None), 400, "messages.0.content", "a text or a list of parts; it is None"),
    "a number as a part": (content([1]), 400, "messages.0.content.0", "type is text or image_url; it is 1"),
    "another part": (
        content([{"type": "input_image"}]), 400, "messages.0.content.0", "type is text or image_url; it is {",
    ),
    "a part without a type": (content([{}]), 400, "messages.0.content.0", "type is text or image_url"),
    "a part of a part's type": (content([{"type": []}]), 400, "messages.0.content.0", "type is text or"),
    "a URL that is no object": (
        content([{"type": "image_url", "image_url": "data:"}]), 400, "messages.0.content.0.image_url",
        "must be an object; it is 'data:'",
    ),
    "an image without its URL": (
        content([{"type": "image_url", "image_url": {}}]), 400, "messages.0.content.0.image_url.url",
        "is missing",
    ),
    "another field of a part": (
        content([{"type": "text", "text": "a", "more": 1}]), 400, "messages.0.content.0.more", "leave it out",
    ),
    "many parts": (content([{"type": "text", "text": "a"}] * 100), 400, "messages.0.content", "64"),
    "a stop that is a number": ({"stop": 1}, 400, "stop", "a text or a list of texts; it is 1"),
    "a stop with a number": ({"stop": ["a", 1]}, 400, "stop.1", "string; it is 1"),
    "a stream that is text": ({"stream": "yes"}, 400, "stream", "boolean; it is 'yes'"),
    "tokens that are text": ({"max_tokens": "2"}, 400, "max_tokens", "integer; it is '2'"),
    "a seed that is true": ({"seed": True}, 400, "seed", "integer; it is True"),
    "no picture": ({"messages": [{"role": "user", "content": "a"}]}, 400, "messages.0.content", "data URL"),
}

# fmt: on


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_impossible_is_refused_by_its_name(address, name):
    change, status, param, words = REFUSED[name]
    done = post(address, body("caption en", SHAPES) | change)
    error = error_of(done)
    assert (done.status_code, error["param"]) == (status, param), error
    assert words in error["message"]


def test_what_changes_nothing_is_accepted(address):
    nothing = {"n": 1, "tools": [], "response_format": {"type": "text"}, "user": "me", "logit_bias": {}}
    nothing |= {"presence_penalty": 0, "stop": None, "top_p": 1, "store": False, "seed": -4, "temperature": 0}
    plain = body("detect red circle", SHAPES)
    assert post(address, plain | nothing).json()["choices"] == post(address, plain).json()["choices"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = zlib.compress(bytes(min(width * height, 10**6)))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def saved(kind: str) -> str:
    """A picture of this format as a data URL."""
    file = io.BytesIO()
    Image.open(SHAPES).convert("RGB").save(file, kind)
    return data_url(file.getvalue())


PICTURES = {
    "http": ("https://example.com/a.png", "fetches nothing"),
    "a path": ("/etc/passwd", "not a data URL"),
    "a file": ("file:///etc/passwd", "not a data URL"),
    "no base64": ("data:image/png,abc", "not in base64"),
    "wrong base64": ("data:image/png;base64,a*b=", "base64 is wrong"),
    "nothing": ("data:image/png;base64,", "0 bytes"),
    "no picture": (data_url(b"hello"), "PNG or JPEG"),
    "a format that Pillow decodes in Python": (saved("QOI"), "JPEG, PNG, WEBP"),
    "a format that Pillow decodes to know its size": (saved("ICO"), "JPEG, PNG, WEBP"),
    "half a picture": (data_url(SHAPES.read_bytes()[:-200]), "cannot be read"),
    "a bomb": (data_url(bomb(60_000, 60_000)), "pixels"),
    "a bomb below Pillow's limit": (data_url(bomb(10_000, 5_000)), "10000 x 5000 pixels, and 49,9"),
}


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_the_usual_formats_are_read(address, kind):
    Image.init()
    if kind == "AVIF" and kind not in Image.SAVE:  # an optional part of Pillow
        assert kind not in Image.OPEN
        return
    done = post(address, body("caption en", saved(kind)))
    assert done.json()["image_size"] == dict(zip(("width", "height"), Image.open(SHAPES).size, strict=True))


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_read_is_named(address, name):
    url, words = PICTURES[name]
    done = post(address, body("caption en", SHAPES, url))
    error = error_of(done)
    assert (done.status_code, error["code"]) == (400, "invalid_image")
    assert words in error["message"]
    assert error["message"].startswith("image 2: ")


def test_the_pixels_of_all_pictures_count_before_they_are_decoded(address):
    half = Image.new("L", (6_000, 5_000))
    file = io.BytesIO()
    half.save(file, "PNG")
    before = counted(address, "process_resident_memory_bytes")
    done = post(address, body("caption en", *[file.getvalue()] * 3))
    assert "image 2" in error_of(done)["message"]
    # One picture of 30 million pixels in RGB is 90 MB, and its grey 30 MB; three would be 360 MB.
    assert counted(address, "process_resident_memory_bytes") - before < 200e6


@pytest.mark.parametrize("sent", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"a":1e999}'])
def test_a_body_that_is_not_a_request_is_refused(address, sent):
    done = post(address, sent)
    assert done.status_code == 400
    assert error_of(done)["type"] == "invalid_request_error"


def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(address):
    many = b'{"model": "demo", "messages": [' + b"{}," * 6_000_000 + b"{}]}"
    before = counted(address, "process_resident_memory_bytes")
    done = post(address, many)
    assert (done.status_code, error_of(done)["code"]) == (400, "too_large")
    assert "20,000 are the most" in error_of(done)["message"]
    assert counted(address, "process_resident_memory_bytes") - before < 100e6  # parsed it takes gigabytes


@pytest.mark.parametrize("name", ["messages", "content"])
def test_few_mistakes_of_a_body_are_listed(name):
    """An object for each would take a kilobyte."""
    sent, wrong = body("caption en", SHAPES), [{}] * 10_000
    if name == "messages":
        sent["messages"] = wrong
    else:
        sent["messages"][0]["content"] = wrong
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(sent)
    assert caught.value.error_count() < 100


def test_a_body_of_another_type_is_refused(address):
    """A page of another origin can send text/plain without the browser asking the server first."""
    done = post(address, body("caption en", SHAPES), headers={"Content-Type": "text/plain"})
    assert (done.status_code, error_of(done)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"{'a': 1}", "the body is not JSON"),
        (b'{"a": "\xff"}', "the body is not JSON"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "the body is not JSON"),
        (b"", "the body is missing"),
    ],
)
def test_a_body_that_is_not_json_is_named(address, sent, words):
    assert error_of(post(address, sent))["message"].startswith(words)


def test_two_types_of_one_body_are_refused(address):
    kind = "Content-Type: application/json"
    sent = json.dumps(body("caption en", SHAPES)).encode()
    with raw(address) as connection:
        connection.sendall(head(len(sent), "Content-Type: text/plain", kind, "Connection: close") + sent)
        assert connection.recv(12) == b"HTTP/1.1 415"


def test_only_lengths_have_the_code_of_a_length(address):
    for prompt, options, code, words in (
        ("caption \ud800", {}, "invalid", "Unicode"),
        ("a" * 100_001, {}, "context_length_exceeded", "100,000 are the most"),
        ("a" * 100_000, {}, "context_length_exceeded", "tokens"),
        ("caption en", {"max_tokens": 1000}, "context_length_exceeded", "lower max_tokens"),
    ):
        done = post(address, body(prompt, SHAPES, **options))
        assert done.status_code == 400
        error = error_of(done)
        assert (error["code"], words in error["message"]) == (code, True), error


HOSTS = {
    "localhost": 200, "LOCALHOST:1": 200, "127.0.0.1:8000": 200, "127.9.9.9": 200, "[::1]:8000": 200,
    "evil.example": 403, "evil.example:8000": 403, "127.0.0.1.evil.example": 403, "10.0.0.1": 403, "": 403,
}  # fmt: skip


def test_what_a_health_check_asks_is_answered(address):
    for path in ("/", "/health"):
        done = HTTP.head(f"{address}{path}")
        assert (done.status_code, done.content) == (200, b"")
        assert int(done.headers["Content-Length"]) > 0


def test_a_model_is_found_by_its_name(client):
    assert client.models.retrieve("demo") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="this server has 'demo'"):
        client.models.retrieve("google/other")


def test_a_page_that_gives_its_name_this_address_is_refused(address):
    """DNS rebinding: the browser sends the page's own name as the Host."""
    for host, status in HOSTS.items():
        for path in ("/", "/v1/models"):
            done = HTTP.get(f"{address}{path}", headers={"Host": host})
            assert done.status_code == status, host
            assert status == 200 or error_of(done)["code"] == "wrong_host"


def test_other_paths_and_methods_are_errors_of_the_same_shape(address):
    for done, status in (
        (HTTP.get(f"{address}/v1/nothing"), 404),
        (HTTP.get(f"{address}{CHAT}"), 405),
        (HTTP.get(f"{address}{CHAT}/"), 404),
        (HTTP.post(f"{address}/v1/completions", json={}), 404),
    ):
        assert done.status_code == status
        assert "/v1/" in error_of(done)["message"]


# Faults and limits


def slow(monkeypatch, seconds: float) -> None:
    """Make a step last at least so long."""
    step = Rows.step
    monkeypatch.setattr(Rows, "step", lambda self: (time.sleep(seconds), step(self))[1])


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_of_100_megabytes_is_refused_and_not_kept(address, chunked):
    part = b" " * (1 << 20)
    before = counted(address, "process_resident_memory_bytes")
    headers = {} if chunked else {"Content-Length": str(100 * len(part))}
    done = HTTP.post(
        f"{address}{CHAT}", content=(part for _ in range(100)),
        headers={"Content-Type": "application/json", **headers},
    )  # fmt: skip
    assert (done.status_code, error_of(done)["code"]) == (413, "too_large")
    # Up to 20 MB are held, in a buffer that grows by copies.
    assert counted(address, "process_resident_memory_bytes") - before < 60e6
    assert answered(address)


def test_bodies_that_are_held_at_once_are_limited(loaded, monkeypatch):
    monkeypatch.setattr("paligemma.serving.gate.BODIES", 2)
    with thread(*loaded, max_body=100_000) as (address, app):
        held = [raw(address) for _ in range(2)]
        for connection in held:
            connection.sendall(head(100_000) + b" " * 90_000)
        wait_for(lambda: app.state.traffic.held == 180_000)
        done = post(address, b" " * 50_000)
        assert (done.status_code, done.headers["Retry-After"]) == (503, "1")
        for connection in held:
            connection.close()
        wait_for(lambda: app.state.traffic.held == app.state.traffic.open == 0)
        assert answered(address)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_frees_its_row(loaded, monkeypatch, streamed):
    slow(monkeypatch, 0.02)
    with thread(*loaded) as (address, app):
        sent = json.dumps(body("caption en", SHAPES, stream=streamed, **LONG)).encode()
        connection = raw(address)
        connection.sendall(head(len(sent)) + sent)
        if streamed:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: counted(address, "paligemma_rows_running") == 1)
        row = app.state.service.engine.rows.live[0]
        connection.close()
        wait_for(lambda: counted(address, "paligemma_rows_running") == 0)
        assert row.finish_reason == "cancelled"
        assert 0 < len(row.tokens) < LONG["max_tokens"]
        assert counted(address, "paligemma_requests_open") == 0
        assert not app.state.service.replies
        assert counted(address, "paligemma_requests_total") > 0


def test_a_client_that_goes_before_the_end_of_its_body_is_forgotten(address):
    with raw(address) as connection:
        connection.sendall(head(10_000) + b"{")
    wait_for(lambda: counted(address, "paligemma_requests_open") == 0)
    assert answered(address)


def test_a_client_that_reads_nothing_blocks_nobody(loaded, monkeypatch):
    """Its row ends, and its connection is closed."""
    monkeypatch.setattr(serving, "STALLED", 0.5)
    listen = serving.listen

    def listening(*where):
        opened = listen(*where)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections too
        return opened

    monkeypatch.setattr(serving, "listen", listening)
    with thread(*loaded, batch_size=1) as (address, app):
        sent = json.dumps(body("caption en", SHAPES, stream=True, logprobs=True, **LONG)).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(place(address))
        connection.sendall((head(len(sent)) + sent) * 4)  # the answers are longer than all buffers
        wait_for(lambda: app.state.service.engine.running == 1)
        assert answered(address)
        wait_for(lambda: not app.state.service.replies and app.state.traffic.open == 0)
        connection.close()


def test_an_answer_does_not_wait_for_the_pictures_of_others(loaded, monkeypatch):
    slow(monkeypatch, 0.02)
    with thread(*loaded) as (address, app), closing(post_stream(address)) as lines:
        next(lines)
        read = threading.Event()
        reading = [app.state.service.threads.submit(read.wait, 20) for _ in range(20)]
        try:
            assert list(lines)[-1] == "data: [DONE]"
            assert not any(other.done() for other in reading)
        finally:
            read.set()


def post_stream(address: str) -> Iterator[str]:
    """The lines of a streamed answer, as they come."""
    with HTTP.stream("POST", f"{address}{CHAT}", json=body("detect star", STARS, stream=True)) as done:
        yield from (line for line in done.iter_lines() if line)


def test_a_full_queue_is_a_503_with_retry_after(loaded, monkeypatch):
    slow(monkeypatch, 0.01)
    with thread(*loaded, batch_size=1, queue=1) as (address, app), ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(post, address, body("caption en", SHAPES, **LONG)) for _ in range(2)]
        wait_for(lambda: app.state.service.engine.waiting == 1)
        done = post(address, body("caption en", SHAPES))
        assert (done.status_code, done.headers["Retry-After"]) == (503, "1")
        assert error_of(done)["code"] == "busy"
        assert [a.result().json()["usage"]["completion_tokens"] for a in asked] == [LONG["max_tokens"]] * 2
        assert answered(address)


def test_an_answer_that_takes_too_long_is_a_504(loaded, monkeypatch):
    slow(monkeypatch, 0.05)
    with thread(*loaded, timeout=0.5) as (address, app):
        done = post(address, body("caption en", SHAPES, **LONG))
        assert (done.status_code, error_of(done)["code"]) == (504, "timeout")
        lines = [
            line
            for line in post(address, body("caption en", SHAPES, stream=True, **LONG)).iter_lines()
            if line
        ]
        assert len(lines) > 1
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        wait_for(lambda: not app.state.service.engine.rows.busy)


@pytest.fixture
def many_files():
    """Room for two thousand open files; the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_connections_at_once(address):
    connections = [raw(address) for _ in range(1000)]
    refused = connections[-1].recv(1000)
    assert refused.startswith(b"HTTP/1.1 503")
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
    sent = json.dumps(body("detect red circle", SHAPES)).encode()
    connections[0].sendall(head(len(sent), "Connection: close") + sent)
    assert connections[0].recv(12) == b"HTTP/1.1 200"  # those before them are served
    for connection in connections:
        connection.close()

    def served() -> bool:
        return HTTP.get(f"{address}/health").status_code == 200

    wait_for(served)
    assert answered(address)


def test_requests_that_are_never_complete_end(loaded, monkeypatch, capfd, caplog):
    def assert_refused(address: str, begun: bytes, status: bytes) -> None:
        with raw(address) as connection:
            connection.sendall(begun)
            reply = b"".join(iter(lambda: connection.recv(4096), b""))
        assert reply.split()[1] == status
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]

    with thread(*loaded, body_timeout=0.3) as (address, _):  # the application refuses a body that is late
        assert_refused(address, head(100) + b"{", b"408")
    monkeypatch.setattr(serving, "LATE", 0.3)  # without it, the connection does
    with thread(*loaded, body_timeout=0.3) as (address, app):
        for begun in (b"", b"POST ", head(100)[:-10]):
            assert_refused(address, begun, b"408")
        assert_refused(address, b"\0\1\2\r\n\r\n", b"400")
        assert answered(address)
        assert app.state.traffic.open == 0
        metrics = HTTP.get(f"{address}/metrics").text
        for status, count in ((400, 1), (408, 3)):
            assert f'paligemma_requests_total{{path="other",status="{status}"}} {count}.0' in metrics
    told = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("127.0.0.1 - other 408: the request was not complete") for line in told) == 3
    assert "127.0.0.1 - other 400: Invalid HTTP request received." in told
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


def test_more_rows_than_the_memory_has_room_for(loaded, monkeypatch):
    monkeypatch.setattr("paligemma.rows.free_bytes", lambda device: 100)
    with pytest.raises(PaliGemmaError, match=r"the caches of 3 rows need .* free: take fewer rows"):
        create_app(*loaded, "demo", Settings(batch_size=3))


# Failures of the engine


def test_an_answer_that_fails_leaves_the_others(loaded, monkeypatch):
    """Once the prefill of a row fails, once a step of all rows."""
    model, processor = loaded
    slow(monkeypatch, 0.01)
    with thread(model, processor) as (address, app), ThreadPoolExecutor(2) as pool:
        long = pool.submit(post, address, body("caption en", SHAPES, **LONG))
        wait_for(lambda: app.state.service.engine.running == 1)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "first_logits", failing("DefaultCPUAllocator: no memory"))
            done = post(address, body("caption en", SHAPES))
        assert (done.status_code, error_of(done)["code"]) == (500, "answer_failed")
        assert "DefaultCPUAllocator" in error_of(done)["message"]
        assert long.result().json()["usage"]["completion_tokens"] == LONG["max_tokens"]

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "next_logits", failing("a kernel failed"))
            done = post(address, body("caption en", SHAPES))
            assert (done.status_code, "a kernel failed" in done.text) == (500, True)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "next_logits", failing("a kernel failed", after=20))
            streamed = post(address, body("caption en", SHAPES, stream=True, **LONG))
        first, *_, last = [json.loads(x.removeprefix("data: ")) for x in streamed.iter_lines() if x]
        assert (streamed.status_code, first["object"]) == (200, "chat.completion.chunk")
        assert "a kernel failed" in last["error"]["message"]
        assert answered(address)
        assert not app.state.service.replies


def failing(message: str, after: int = 0):
    """A method that fails, or a product that fails after so many calls."""
    calls, original = itertools.count(), PaliGemma.next_logits

    def fail(*args):
        if next(calls) < after:
            return original(*args)
        raise RuntimeError(message)

    return fail


def test_a_stream_whose_objects_fail_ends_with_an_error(loaded, monkeypatch, capfd):
    with thread(*loaded) as (address, _):
        monkeypatch.setattr("paligemma.serving.reply.described", failing("a fault of the objects"))
        last = list(post_stream(address))[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "RuntimeError: a fault of the objects" in capfd.readouterr().err


def test_rows_that_wait_survive_the_failure_of_a_step(loaded, monkeypatch):
    model, processor = loaded
    slow(monkeypatch, 0.02)
    with thread(model, processor, batch_size=1) as (address, app), ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, address, body("caption en", SHAPES, **LONG))
        wait_for(lambda: app.state.service.engine.running == 1)
        second = pool.submit(post, address, body("detect red circle", SHAPES))
        wait_for(lambda: app.state.service.engine.waiting == 1)
        original, once = type(model).next_logits, threading.Event()

        def fail(*args):
            if not once.is_set():
                once.set()
                raise RuntimeError("a kernel failed")
            return original(*args)

        monkeypatch.setattr(type(model), "next_logits", fail)
        assert first.result().status_code == 500
        assert second.result().json()["choices"][0]["objects"]


def test_weights_with_nan_are_an_error_that_names_them():
    model, processor = load_hf_model("demo", dtype="float32")
    with torch.no_grad():
        model.language_model.model.norm.weight[0] = torch.nan
    with thread(model, processor) as (address, _):
        for _ in range(2):
            done = post(address, body("caption en", SHAPES))
            assert done.status_code == 500
            assert "norm.weight hold NaN" in error_of(done)["message"]
        assert HTTP.get(f"{address}/health").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_says_that_the_engine_has_ended(loaded, monkeypatch):
    with thread(*loaded) as (address, _):
        assert HTTP.get(f"{address}/health").json() == {"status": "ok", "error": None}
        monkeypatch.setattr(Engine, "_step", failing("a fault of the engine"))
        done = post(address, body("caption en", SHAPES))
        assert (done.status_code, "a fault of the engine" in done.text) == (500, True)
        health = HTTP.get(f"{address}/health")
        assert health.status_code == 503
        assert health.json() == {"status": "failed", "error": "a fault of the engine"}
        assert post(address, body("caption en", SHAPES)).status_code == 503


# The end


KEY = "secret-4711"


def test_the_key_is_from_a_file_or_the_environment(tmp_path, monkeypatch):
    assert api_key(None) is None
    monkeypatch.setenv("PALIGEMMA_API_KEY", "other")
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert (api_key(None), api_key(str(tmp_path / "key"))) == ("other", KEY)


def test_a_signal_finishes_what_has_begun(tmp_path):
    """And the API key is asked for until then."""
    with Process(tmp_path / "stderr", PALIGEMMA_API_KEY=KEY) as server:
        address = server.address
        for given in (None, "Bearer wrong", f"Bearer {KEY}x", KEY, f"Basic {KEY}", "Bearer é"):
            headers = {} if given is None else {"Authorization": given.encode()}
            for path in ("/v1/models", "/metrics"):
                done = HTTP.get(f"{address}{path}", headers=headers)
                assert (done.status_code, error_of(done)["code"]) == (401, "invalid_api_key")
                assert done.headers["WWW-Authenticate"] == "Bearer"
            assert post(address, body("caption en", SHAPES), headers=headers).status_code == 401
        assert HTTP.get(f"{address}/health").status_code == 200
        assert HTTP.get(f"{address}/metrics", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
        described = HTTP.get(f"{address}/openapi.json").text
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY)
        assert [model.id for model in client.models.list()] == ["demo"]
        options = {**LONG, "max_tokens": 400, "stream": True, "stream_options": {"include_usage": True}}
        stream = client.chat.completions.create(**body("caption en", SHAPES, **options))
        next(stream)
        asked = {"Authorization": f"bearer {KEY}"}
        with raw(address) as incomplete:
            incomplete.sendall(head(100, f"Authorization: Bearer {KEY}") + b"{")
            wait_for(
                lambda: "paligemma_requests_open 2.0" in HTTP.get(f"{address}/metrics", headers=asked).text
            )
            server.running.send_signal(signal.SIGTERM)
            assert incomplete.recv(12) == b"HTTP/1.1 503"
        assert list(stream)[-1].usage.completion_tokens == 400
        assert server.running.wait(60) == 0
        assert "shutting down, after 1 requests that are complete" in server.stderr
        refused, whole = (server.stderr.index(f"POST {CHAT} {status}") for status in (503, 200))
        assert refused < whole  # at once, not when its time is up
        assert "Traceback" not in server.stderr
        assert KEY not in server.stderr + described


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_after_the_last_answer_and_not_before(number):
    traffic = Traffic(open=1)
    server = serving.Server(uvicorn.Config(FastAPI(), log_config=None), traffic)

    async def drain() -> None:
        with server.capture_signals():
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.2)
        assert traffic.draining
        assert not server.should_exit
        traffic.open = 0
        await server.draining
        assert server.should_exit

    asyncio.run(drain())


def test_new_requests_are_refused_at_the_end(loaded, monkeypatch):
    slow(monkeypatch, 0.01)
    with thread(*loaded) as (address, app), ThreadPoolExecutor(1) as pool:
        begun = pool.submit(post, address, body("caption en", SHAPES, **LONG))
        wait_for(lambda: app.state.service.engine.running == 1)
        app.state.traffic.draining = True
        done = post(address, body("caption en", SHAPES))
        assert (done.status_code, error_of(done)["code"]) == (503, "shutting_down")
        assert HTTP.get(f"{address}/health").json()["status"] == "shutting down"
        assert begun.result().status_code == 200


# The description


def test_requests_made_from_the_description_find_no_fault_of_the_server(address):
    checks = [not_a_server_error, response_schema_conformance, status_code_conformance]
    schema, statuses = schemathesis.openapi.from_url(f"{address}/openapi.json"), set()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == {
        CHAT, "/v1/models", "/v1/models/{model}", "/health", "/metrics",
    }  # fmt: skip
    for operation in operations:

        @hypothesis.settings(
            max_examples=60 if operation.path == CHAT else 3, deadline=None, derandomize=True,
            database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            response = case.call()
            statuses.add(response.status_code)
            case.validate_response(response, checks=checks)

        check()
    assert {200, 400} <= statuses
    assert answered(address)


# The command


def test_help_is_fast_and_imports_nothing_large():
    code = "import sys, paligemma.serve\ntry: paligemma.serve.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'fastapi', 'uvicorn', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("[]\n")
    assert "--api-key-file" in done.stdout


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_one_line(package, tmp_path):
    hidden = "import importlib.util as u\nfind = u.find_spec\n"
    hidden += f"u.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a)\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    code = "from paligemma import command, serve; command.process(serve.main)"
    options = {"capture_output": True, "cwd": ROOT, "check": False}
    env = command_line.environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = subprocess.run([sys.executable, "-c", code, "--model", "demo"], env=env, **options)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith(f"error: the server needs the package {package}")
    assert "pip install 'paligemma[serve]'" in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_wrong_options_are_one_line(address, tmp_path):
    (tmp_path / "empty").write_text("\n")
    port = address.rpartition(":")[2]
    for args, words, code in (
        (("--port", port), "in use", 1),
        (("--host", "nowhere.invalid"), "nowhere.invalid", 1),
        (("--port", 65536), "65535", 2),
        (("--api-key-file", tmp_path / "none"), "cannot be read", 1),
        (("--api-key-file", tmp_path / "empty"), "no key", 1),
        (("--batch-size", 0), "--batch-size", 2),
        (("--host", ""), "--host is empty", 2),
        (("--model", ""), "--model is empty", 2),
    ):
        done = command_line.run("--model", "demo", *args, module="paligemma.serve")
        assert_one_line(done, words, code=code)
    done = command_line.run("--model", "demo", module="paligemma.serve", env={"PALIGEMMA_API_KEY": ""})
    assert_one_line(done, "PALIGEMMA_API_KEY has no key")
