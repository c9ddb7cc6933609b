"""A tokenizer rebuilt from tokenizer.json encodes and decodes as the original tokenizer.model."""

import copy
import functools
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from checkpoints import config_dict
from test_processor import BYTES, REAL, fuzzed_prompts, peer, real_model

from paligemma.config import PaliGemmaConfig
from paligemma.errors import PaliGemmaError
from paligemma.tokenizer import Tokenizer
from paligemma.tokenizer.added_tokens import read_entries
from paligemma.tokenizer.json_model import SEQUENCE, agrees, lists_pieces, sentencepiece_model

TINY = PaliGemmaConfig.from_dict(config_dict())


@functools.cache
def saved(model: bytes) -> dict:
    """The tokenizer.json that transformers writes for a SentencePiece model, `<image>` after its pieces."""
    with tempfile.TemporaryDirectory() as directory:
        peer(model).tokenizer.save_pretrained(directory)
        return json.loads((Path(directory) / "tokenizer.json").read_text(encoding="utf-8"))


def with_model(tokenizer: dict, **changes) -> dict:
    return {**tokenizer, "model": {**tokenizer["model"], **changes}}


def as_saved(tokenizer: dict) -> dict:
    """As transformers 5 writes it: merges as pairs."""
    return tokenizer


def older(tokenizer: dict) -> dict:
    """As tokenizers before 0.20 wrote it, merges as text; and without `<image>`, which the processor adds."""
    *added, image = tokenizer["added_tokens"]
    assert image["content"] == "<image>"
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    return with_model({**tokenizer, "added_tokens": added}, merges=merges)


def gemma_and_additions(tokenizer: dict) -> dict:
    """As Gemma's own file, with the tokens that the processor adds and one more after them.

    In that file runs of blanks are merges, and the piece of the tab's byte is a tab.
    """
    pieces = {piece: i for piece, i in tokenizer["model"]["vocab"].items() if i < 256000}
    vocab = {"\t" if piece == "<0x09>" else piece: i for piece, i in pieces.items()}
    added = [entry for entry in tokenizer["added_tokens"] if entry["content"].strip(" \t\n▁")]
    merges = [merge for merge in tokenizer["model"]["merges"] if set("".join(merge)) != {"\t"}]
    tabs = [(i, n - i) for n in range(2, 32) for i in range(1, n)]  # possible as the tab itself is a piece
    merges += [["\t" * first, "\t" * second] for first, second in tabs]
    assert (len(vocab), len(merges)) == (256000, 580604)
    assert len(added) == 1402 - 31 - 30 - 30
    added.append({"id": 257153, "content": "<box>", "special": True})
    return with_model({**tokenizer, "added_tokens": added}, vocab=vocab, merges=merges)


VARIANTS = [as_saved, older, gemma_and_additions]


@pytest.fixture(scope="module")
def original() -> Tokenizer:
    return Tokenizer(real_model(), REAL)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.__name__)
def rebuilt(request) -> Tokenizer:
    tokenizer = request.param(saved(real_model()))
    return Tokenizer(sentencepiece_model(tokenizer), REAL, read_entries(None, tokenizer))


def test_encode_and_decode_are_the_same(original, rebuilt):
    runs = [c * n for c in " \n\t" for n in range(1, 32)]
    for text in ["", "\r\n", *runs, *fuzzed_prompts(4000)]:
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)


def test_every_id_is_the_same(original, rebuilt):
    assert [rebuilt.piece(i) for i in range(257153)] == [original.piece(i) for i in range(257153)]
    ids = list(range(len(rebuilt.pieces)))
    for of in ("is_byte", "is_control", "is_unknown"):
        assert getattr(rebuilt.pieces, of)(ids) == getattr(original.pieces, of)(ids)
    assert rebuilt.decode([257152], skip_special_tokens=False) == "<image>"
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens, of_bytes = rng.integers(0, 257153, 10), BYTES + rng.integers(0, 256, 10)
        ids = np.concatenate([tokens, of_bytes, [0, 1, 2, 3, 257152]])
        rng.shuffle(ids)
        for skip in (True, False):
            assert rebuilt.decode(ids, skip) == original.decode(ids, skip)


@pytest.mark.parametrize("word", ["<bos>", "<eos>", "<pad>", "<image>"])
def test_spelled_special_tokens_stay_text(original, rebuilt, word):
    for text in (word, f"a{word} b", word * 3):
        assert rebuilt.encode(text) == original.encode(text)
        assert not {0, 1, 2, 3, 257152} & set(rebuilt.encode(text))


def test_ids_of_the_rebuilt_tokenizer(rebuilt):
    pieces = rebuilt.pieces
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (0, 1, 2, 3)
    names = {106: "<start_of_turn>", 108: "\n", BYTES + 9: "<0x09>", 255999: "<unused99>"}
    names |= {256000: "<loc0000>", 257151: "<seg127>"}
    assert {i: rebuilt.piece(i) for i in names} == names


@pytest.mark.parametrize("variant", [as_saved, older])
def test_small_tokenizer(tokenizer_model, tmp_path, variant):
    tokenizer = saved(tokenizer_model)  # it has a <mask>: transformers adds one if there is none
    own = [entry for entry in tokenizer["added_tokens"] if entry["id"] < 1600]
    tokenizer = variant({**tokenizer, "added_tokens": [*own, {"id": 1600, "content": "<image>"}]})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    ours, original = Tokenizer.load(tmp_path, TINY), Tokenizer(tokenizer_model, TINY)
    texts = ["the cat is left of the dog", "detect cat", *fuzzed_prompts(1500)]
    assert [ours.encode(text) for text in texts] == [original.encode(text) for text in texts]
    for i in range(1601):
        assert ours.decode([i], False) == original.decode([i], False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vocabulary_is_compared(original, variant):
    """By the file's text, which is fast, and by the parsed file, which works for every layout of the text."""
    tokenizer = variant(saved(real_model()))
    names = [original.piece(i) for i in range(len(original.pieces))]
    text = json.dumps(tokenizer, ensure_ascii=False, indent=2).encode()
    assert lists_pieces(text, names)
    assert agrees(tokenizer, names)
    assert not lists_pieces(json.dumps(tokenizer).encode(), names)  # another layout, which is parsed
    for i, j in ((100, 101), (108, 109), (5000, 250000)):
        other = names.copy()
        other[i], other[j] = names[j], names[i]
        same = j >= len(tokenizer["model"]["vocab"])
        assert lists_pieces(text, other) == agrees(tokenizer, other) == same
    assert not lists_pieces(text, names[:200000])
    assert not agrees(tokenizer, names[:200000])


def test_a_normalizer_in_a_sequence(tokenizer_model):
    tokenizer = saved(tokenizer_model)
    assert tokenizer["normalizer"] in SEQUENCE["normalizers"]
    assert sentencepiece_model({**tokenizer, "normalizer": SEQUENCE}) == sentencepiece_model(tokenizer)


def test_model_wins_over_json(tmp_path, tokenizer_model):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len(Tokenizer.load(tmp_path, TINY).pieces) == 1600


def broken(**changes) -> dict:
    """Changes of the model section; of the top level with a leading underscore. `...` removes an entry."""
    return changes


def stable_id(value: object) -> str:
    """The same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(("changes", "problem"), [
    (broken(type="Unigram"), "not Gemma's kind"),
    (broken(type=...), "has no 'type'"),
    (broken(byte_fallback=False), "not Gemma's kind"),
    (broken(byte_fallback=...), "has no 'byte_fallback'"),
    (broken(_normalizer=None), "not Gemma's kind"),
    (broken(_normalizer={"type": "NFKC"}), "not Gemma's kind"),
    (broken(_normalizer=...), "has no 'normalizer'"),
    (broken(_model=...), "has no 'model'"),
    (broken(_model=None), "cannot be used"),
    (broken(_model=[1]), "cannot be used"),
    (broken(vocab=...), "has no 'vocab'"),
    (broken(vocab={}), "has no"),
    (broken(vocab=None), "cannot be used"),
    (broken(vocab=lambda v: {**v, "new": 9999}), "without a gap"),
    (broken(vocab=lambda v: {**v, "new": 5}), "without a gap"),
    (broken(vocab=lambda v: {**v, "new": -1}), "without a gap"),
    (broken(vocab=lambda v: {**v, "new": "x"}), "cannot be used"),
    (broken(vocab=lambda v: {**v, "new": 1601.5}), "without a gap"),
    (broken(vocab=lambda v: {**v, "\ud800": 1601}), "cannot be used"),
    (broken(vocab=lambda v: {piece: i for piece, i in v.items() if piece != "<0x41>"}), "without a gap"),
    (broken(vocab=lambda v: {"A" * 9 if piece == "<0x41>" else piece: i for piece, i in v.items()}),
     "256 byte pieces"),
    (broken(unk_token=None), "has no None"),
    (broken(merges=...), "has no 'merges'"),
    (broken(merges=None), "cannot be used"),
    (broken(merges=["ab"]), "cannot be used"),
    (broken(merges=["a b c"]), "cannot be used"),
    (broken(merges=[["a"]]), "cannot be used"),
    (broken(merges=[["a", 1]]), "cannot be used"),
    (broken(merges=[3]), "cannot be used"),
    (broken(_added_tokens=None), "cannot be used"),
    (broken(_added_tokens=[{"id": 1601}]), "has no 'content'"),
    (broken(_added_tokens=[{"content": "x"}]), "'x' has the id None"),
    (broken(_added_tokens=["x"]), "cannot be used"),
    (broken(_added_tokens=[{"id": 1601, "content": 5}]), "cannot be used"),
    (broken(_added_tokens=[{"id": 5000, "content": "<x>"}]),
     "'<x>' is 5000, but the next free id.* is 1601: .* without a gap"),
    (broken(_added_tokens=[{"id": 1601, "content": "a"}]),
     "'a' is 1601, but the vocabulary has it as .*: correct the id"),
    (broken(_added_tokens=[{"id": 1601, "content": "<image>"}]),
     "<image> is 1601, config.json's 1600: they are not of one checkpoint"),
], ids=stable_id)  # fmt: skip
def test_broken_files(tmp_path, tokenizer_model, changes, problem):
    tokenizer = copy.deepcopy(saved(tokenizer_model))
    for name, value in changes.items():
        section = tokenizer if name.startswith("_") else tokenizer["model"]
        name = name.lstrip("_")
        if value is ...:
            del section[name]
        else:
            section[name] = value(section[name]) if callable(value) else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PaliGemmaError, match=problem) as caught:
        Tokenizer.load(tmp_path, TINY)
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"], ids=repr)
def test_no_json(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(PaliGemmaError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, TINY)


def test_missing_special_token(tokenizer_model):
    tokenizer = json.loads(json.dumps(saved(tokenizer_model)).replace("<bos>", "<s>"))
    with pytest.raises(PaliGemmaError, match="has no '<bos>'"):
        sentencepiece_model(tokenizer)


def test_pieces_and_kinds_are_the_originals(tokenizer_model):
    models = sentencepiece_model(saved(tokenizer_model)), tokenizer_model
    ours, original = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in models)
    for i in range(len(original)):
        for of in ("id_to_piece", "is_control", "is_unknown", "is_byte"):
            assert getattr(ours, of)(i) == getattr(original, of)(i)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(ours, name)() == getattr(original, name)()
