"""Tokens that a fine-tune added are those of transformers, whichever files list them.

The error about a damaged file names the file and the remedy.
"""

import json
import re
import shutil
import unicodedata
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import config_dict, train_tokenizer
from conftest import photo
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_processor import peer_images, theirs

from paligemma.answers.parsing import parse
from paligemma.config import PaliGemmaConfig
from paligemma.errors import PaliGemmaError
from paligemma.processor import Processor
from paligemma.tokenizer import TextStream, Tokenizer
from paligemma.tokenizer.added_tokens import FILES, AddedToken, Splitter

SIZE = 1602  # of the vocabulary, with the <mask> that transformers adds to every one
CONFIG = PaliGemmaConfig.from_dict(config_dict(text={"vocab_size": SIZE + 64}, image_token_index=SIZE))
ADDED = [
    AddedToken("<image>", special=True, normalized=False),
    AddedToken("<box>"),
    AddedToken("a b"),
    AddedToken("<left>", lstrip=True, normalized=False),
    AddedToken("<both>", lstrip=True, rstrip=True, special=True, normalized=False),
    AddedToken("<right>", rstrip=True),
    AddedToken("word", single_word=True),
    AddedToken("wordy\n", normalized=False),
    AddedToken("é▁x"),
    AddedToken("猫", special=True, normalized=False),
    AddedToken(" <"),
    # These tokens are in the vocabulary, too.
    AddedToken("cat"),
    AddedToken("<turn>", special=True, normalized=False),
    AddedToken("▁dog", normalized=False),
    AddedToken("red", single_word=True),
    AddedToken("▁left"),
    AddedToken("ct", lstrip=True),
]
FRAGMENTS = [token.content for token in ADDED[1:]] + [
    " ", "  ", "\n", "\n\n", "\t", "\u3000", "\x1c", "a", "b", "s", "cat", " cat", "con", "words", "dword",
    "é", "é x", "▁", "the dog", "dogs", "reds", "left", " left", "circle", "<", "<mask>", "<loc0001>",
    "<seg001>", "<loc9999>", "<bo", "x>", "_", "-", "\u200d", "\u0301", "ⓐ", "😀",
]  # fmt: skip
# Category Cn is excluded: of characters newer than its tables, Python does not know which ones are letters.
KNOWN = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=3)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | KNOWN, max_size=8).map("".join)
TEXTS = TEXTS.filter(lambda text: not re.search("<(bos|eos|pad|unk|image)>", text))


def as_transformers_4(directory: Path, model: bytes, tokenizer) -> None:
    """Write the files of transformers 4. Its tokenizer.json is the same as that of transformers 5."""

    def write(name: str, content: dict) -> None:
        (directory / name).write_text(json.dumps(content))

    (directory / "tokenizer.model").write_bytes(model)
    tokens, fields = {}, list(asdict(ADDED[0]))
    for i, token in tokenizer.added_tokens_decoder.items():
        tokens[i] = AddedToken(**{field: getattr(token, field) for field in fields})
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    own = {*names.values(), "<mask>"}
    extra = [token.content for token in tokens.values() if token.special and token.content not in own]
    config = {"add_bos_token": True, "additional_special_tokens": extra, "tokenizer_class": "GemmaTokenizer"}
    decoder = {i: asdict(token) for i, token in tokens.items()}
    write("tokenizer_config.json", config | names | {"added_tokens_decoder": decoder})
    write("added_tokens.json", {token.content: i for i, token in tokens.items() if i >= SIZE - 1})
    special = {token.content: asdict(token) for token in tokens.values()}
    for entry in special.values():
        del entry["special"]
    by_name = {key: special[name] for key, name in names.items()}
    listed = {"additional_special_tokens": [special[name] for name in extra]}
    write("special_tokens_map.json", listed | by_name)


LAYOUTS = {
    "transformers 5": ["5/tokenizer.json", "5/tokenizer_config.json"],
    "transformers 4": ["tokenizer.model", "tokenizer.json", *FILES],
    "transformers 4, slow": ["tokenizer.model", *FILES],
    "transformers 5 over an old tokenizer.model":
        ["tokenizer.model", "tokenizer.json", "5/tokenizer_config.json"],
    "transformers 4 without tokenizer_config.json":
        ["tokenizer.model", "tokenizer.json", "added_tokens.json"],
    "tokenizer.json alone": ["tokenizer.json"],
    "tokenizer.json and the configuration of transformers 4": ["tokenizer.json", "tokenizer_config.json"],
    "added_tokens.json beside tokenizer.model": ["tokenizer.model", "added_tokens.json"],
    "added_tokens.json and special_tokens_map.json beside tokenizer.model":
        ["tokenizer.model", "added_tokens.json", "special_tokens_map.json"],
    "tokenizer.model alone": ["tokenizer.model"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer("<mask>", "<turn>")


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    """The files of transformers 4 for a tokenizer with added tokens; in 5/ those of transformers 5."""
    import tokenizers
    from transformers import GemmaTokenizer

    directory = tmp_path_factory.mktemp("written")
    (directory / "tokenizer.model").write_bytes(model)
    tokenizer = GemmaTokenizer.from_pretrained(directory)
    assert len(tokenizer) == SIZE
    tokenizer.add_tokens([tokenizers.AddedToken(**asdict(token)) for token in ADDED])
    tokenizer.save_pretrained(directory / "5")
    shutil.copy(directory / "5" / "tokenizer.json", directory)
    as_transformers_4(directory, model, tokenizer)
    return directory


@pytest.fixture(scope="module")
def tokenizer(written) -> Tokenizer:
    return Tokenizer.load(written, CONFIG)


class Both:
    """Two tokenizers. A failure prints the short repr of this class."""

    def __init__(self, ours: Processor, peer):
        self.ours, self.peer = ours, peer


@pytest.fixture(scope="module", params=LAYOUTS)
def both(request, written, tmp_path_factory) -> "Both":
    """Our processor and that of transformers, from the same directory."""
    from transformers import GemmaTokenizer, PaliGemmaProcessor

    directory = tmp_path_factory.mktemp("layout")
    for name in LAYOUTS[request.param]:
        shutil.copy(written / name, directory)
    peer = PaliGemmaProcessor(peer_images(56), GemmaTokenizer.from_pretrained(directory))
    return Both(Processor.load(directory, CONFIG), peer)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="<both> \n x")  # the newline is a token, although <both> strips the white space around it
@example(text="wordy\n  <both>\n\n\tdword <loc0001> <mask>")
@example(text="a b <right> \t cat ▁dog dog a▁b")
def test_ids_and_text_are_transformers(both, text):
    ours, peer = both.ours.tokenizer, both.peer.tokenizer
    ids = ours.encode(text)
    assert ids == peer.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert ours.decode(ids, skip) == peer.decode(ids, skip_special_tokens=skip)
    assert "".join(ours.texts(ids)) == ours.decode(ids)


def test_every_id_is_transformers(both):
    ours, peer = both.ours.tokenizer, both.peer.tokenizer
    ids = list(range(len(peer)))
    pieces = [token.replace(" ", "▁") for token in peer.convert_ids_to_tokens(ids)]
    assert [ours.piece(i).replace(" ", "▁") for i in ids] == pieces
    # transformers decodes a single byte as �, so the ids of bytes are left out.
    first, last = (ours.pieces.piece_to_id(piece) for piece in ("<0x00>", "<0xFF>"))
    for i in ids[:first] + ids[last + 1 :]:
        for skip in (True, False):
            assert ours.decode(i, skip) == peer.decode([i], skip_special_tokens=skip)


def test_prompts_and_suffixes_are_transformers(both):
    prompts = ["", "<box> a b", " <both> cat", "detect <left>", "word", "words", "猫", "find a b\nred"]
    images = [photo(9, 9)] * len(prompts)
    for suffixes in (None, [*prompts[1:], "<loc0001> a b"]):
        ours = both.ours.arrays(prompts, images, suffixes)
        wanted = theirs(both.peer, prompts, **({} if suffixes is None else {"suffix": suffixes}))
        for name in ("input_ids", "attention_mask"):
            if suffixes is not None:
                wanted[name] = wanted[name][:, :-1]  # without <eos>
            np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)


def test_spelled_control_tokens_stay_text(both):
    for word in ("<bos>", "<eos>", "<pad>", "<unk>", "<image>"):
        ids = both.ours.tokenizer.encode(f"a{word} b <box>{word}")
        assert not {0, 1, 2, 3, SIZE} & set(ids)
        assert both.ours.tokenizer.decode(ids) == f"a{word} b <box>{word}"


def test_streaming_is_decoding(both):
    tokenizer = both.ours.tokenizer
    first, size = tokenizer.pieces.piece_to_id("<0x00>"), len(both.peer.tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(60):
        characters = [first + byte for byte in "é€".encode()]
        added, pieces = rng.integers(SIZE - 2, size + 2, 12), rng.integers(0, SIZE, 4)
        ids = np.concatenate([added, pieces, characters, [first + 0xE2]])
        rng.shuffle(ids)
        stream = TextStream(tokenizer)
        for n, i in enumerate(ids.tolist(), 1):
            stream.push(i)
            assert stream.text == tokenizer.decode(ids[:n])
        assert stream.finish() or stream.shown == tokenizer.decode(ids)


def test_white_space_and_words_are_those_of_tokenizers():
    """Every character, next to a token that strips white space and next to one that must be a whole word."""
    import tokenizers

    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<s>": 0, "<w>": 1}, merges=[]))
    strip = AddedToken("<s>", lstrip=True, rstrip=True, normalized=False)
    single = AddedToken("<w>", single_word=True, normalized=False)
    peer.add_tokens([tokenizers.AddedToken(**asdict(token)) for token in (strip, single)])
    ours = Splitter({0: strip, 1: single})
    every = map(chr, [*range(0xD800), *range(0xE000, 0x110000)])
    characters = [c for c in every if unicodedata.category(c) not in ("Cn", "Co")]
    characters = characters[:0x3000] + characters[0x3000::41]  # most of the others are CJK characters
    for text in ("".join(f"{c}<w>-" for c in characters), "".join(f"<w>{c}-" for c in characters)):
        assert [part for part in ours.split(text) if isinstance(part, int)] == peer.encode(text).ids
    for text in (text for c in characters for text in (f"{c}<s>", f"<s>{c}")):
        assert (len(ours.split(text)) == 1) == (peer.encode(text).offsets == [(0, 4)]), ascii(text)


@pytest.mark.parametrize(("ids", "text"), [
    ([5, 1604], "a b"), ((1604,), "a b"), (1604, "a b"), (np.int32(1604), "a b"), (np.array(1604), "a b"),
    (torch.tensor(1604), "a b"), ([[1604, 1604]], "a ba b"), (np.array([[1604]]), "a b"),
    (torch.tensor([[1604, 1604]]), "a ba b"), ([torch.tensor([1604, 1604])], "a ba b"),
    ([torch.tensor(1604), np.int64(1604)], "a ba b"), (range(1604, 1605), "a b"),
    ([], ""), ([[]], ""), (np.zeros((1, 0), int), ""),
], ids=str)  # fmt: skip
def test_one_row_of_ids_of_any_kind(tokenizer, ids, text):
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("ids", "problem"), [
    ([[1604], [1604]], "are 2 rows: give one row at a time"), (np.ones((3, 2), int), "are 3 rows"),
    (torch.ones(2, 1, dtype=torch.long), "are 2 rows"), ([[[1604]]], r"contain \[1604\]"),
    ([1604, [1604]], "are 2 rows"), ([1.0], "contain 1.0; they must be whole numbers"),
    (np.ones(2), "contain 1.0"), ("text", "contain 'text'"), (b"ab", "contain b'ab'"), (None, "contain None"),
    ([None], "contain None"), ([True], "contain True"), ({"input_ids": [5]}, "contain {'input_ids'"),
    (["a\nb"], "contain 'a"), (torch.tensor([True]), "contain True"),
], ids=str)  # fmt: skip
def test_anything_but_one_row_of_ids_is_refused(tokenizer, ids, problem):
    for ask in (tokenizer.decode, lambda ids: parse(tokenizer, ids, (9, 9))):
        with pytest.raises(PaliGemmaError, match=problem) as caught:
            ask(ids)
        assert "\n" not in str(caught.value)


def test_an_added_token_without_an_embedding_is_refused_when_it_is_used(written):
    config = PaliGemmaConfig.from_dict(config_dict(text={"vocab_size": SIZE + 3}, image_token_index=SIZE))
    tokenizer = Tokenizer.load(written, config)
    assert tokenizer.encode("<box>a b") == [SIZE + 1, SIZE + 2]
    message = f"'<left>' is {SIZE + 3}, and the model has embeddings for {SIZE + 3} tokens only"
    with pytest.raises(PaliGemmaError, match=f"the added token {message}"):
        tokenizer.encode("a <left>")
    assert tokenizer.decode([SIZE + 3]) == "<left>"


# --- the files


def copy(written: Path, directory: Path, *files: str) -> None:
    for file in files:
        shutil.copy(written / file, directory)


def test_another_directory_or_file_as_the_tokenizer(written, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(written, tmp_path / "mine")
    for file in ("~/mine", "~/mine/tokenizer.json", tmp_path / "mine" / "5", str(written)):
        assert Tokenizer.load(tmp_path, CONFIG, file).encode("<box>") == [SIZE + 1]
    alone = Tokenizer.load(tmp_path, CONFIG, "~/mine/tokenizer.model")  # no other file is read
    assert alone.encode("<box>") != [SIZE + 1]
    missing = "the tokenizer ~/none does not exist: give"
    for file, problem in (("~/none", missing), ("~", "has no tokenizer.model and no tokenizer.json")):
        with pytest.raises(PaliGemmaError, match=problem):
            Tokenizer.load(written, CONFIG, file)


def swapped(vocab: dict) -> dict:
    """The vocabulary with the ids of two pieces exchanged, in the order of ids."""
    changed = {**vocab, "▁circle": vocab["▁green"], "▁green": vocab["▁circle"]}
    return dict(sorted(changed.items(), key=lambda item: item[1]))


def renamed(vocab: dict) -> dict:
    return {"<total>" if piece == "<seg001>" else piece: i for piece, i in vocab.items()}


def unlisted(added: list[dict]) -> list[dict]:
    return [entry for entry in added if entry["content"] not in ("<seg001>", "<total>")]


def listed_by_its_new_name(added: list[dict]) -> list[dict]:
    return [{**entry, "content": entry["content"].replace("<seg001>", "<total>")} for entry in added]


def listed_as_added(added: list[dict]) -> list[dict]:
    return [*unlisted(added), {"id": SIZE - 1, **asdict(AddedToken("<total>", normalized=False))}]


CHANGED = {  # name -> the changes to the vocabulary and to the list of added tokens
    "two pieces exchanged": (swapped, lambda added: added),
    "a piece renamed": (renamed, unlisted),
    "a piece renamed and listed": (renamed, listed_by_its_new_name),
    "a piece renamed and added": (renamed, listed_as_added),
}


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("listed", [False, True], ids=["", "tokenizer_config.json lists added tokens"])
@pytest.mark.parametrize("indent", [2, None], ids=["as tokenizers writes it", "on one line"])
def test_a_vocabulary_changed_in_tokenizer_json_alone(written, tmp_path, kind, listed, indent):
    """transformers reads tokenizer.json even if there is another tokenizer.model."""
    from transformers import GemmaTokenizer, PaliGemmaProcessor

    copy(written, tmp_path, "tokenizer.model", "tokenizer.json", "5/tokenizer_config.json")
    names = ("tokenizer.json", "tokenizer_config.json")
    content, config = (json.loads((tmp_path / name).read_text("utf-8")) for name in names)
    vocab, added = CHANGED[kind]
    content["model"]["vocab"] = vocab(content["model"]["vocab"])
    content["added_tokens"] = added(content["added_tokens"])
    if kind == "a piece renamed and added":
        content["added_tokens"][-1]["id"] = content["model"]["vocab"]["<total>"]
        content["added_tokens"].sort(key=lambda entry: entry["id"])
    if listed:
        copies = [dict(entry) for entry in content["added_tokens"]]
        config["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in copies}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=indent), "utf-8")
    ours = Tokenizer.load(tmp_path, CONFIG)
    peer = PaliGemmaProcessor(peer_images(56), GemmaTokenizer.from_pretrained(tmp_path)).tokenizer
    old = Tokenizer((tmp_path / "tokenizer.model").read_bytes(), CONFIG)
    text = "a green <total> circle <seg000>"
    assert ours.encode(text) == peer.encode(text, add_special_tokens=False)
    assert [ours.piece(i) for i in range(SIZE)] == peer.convert_ids_to_tokens(list(range(SIZE)))
    assert [ours.piece(i) for i in range(SIZE)] != [old.piece(i) for i in range(SIZE)]


def test_two_vocabularies_of_which_one_cannot_be_used(written, tmp_path):
    copy(written, tmp_path, "tokenizer.model", "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["model"] |= {"vocab": swapped(content["model"]["vocab"]), "byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    remedy = "delete the one that is not this checkpoint's"
    message = rf"tokenizer\.model and tokenizer\.json have different pieces .*: {remedy}"
    with pytest.raises(PaliGemmaError, match=message):
        Tokenizer.load(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["extra_special_tokens", "additional_special_tokens"])
def test_null_lists_no_special_token(written, tmp_path, name):
    copy(written, tmp_path, "tokenizer.model", "tokenizer.json")
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(json.dumps({name: None}))
    assert Tokenizer.load(tmp_path, CONFIG).encode("<box>") == [SIZE + 1]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4264023\n"
UNREADABLE = {  # name -> (what damages a path, the words of the error)
    "empty": (lambda path: path.write_bytes(b""), "download it again"),
    "text": (lambda path: path.write_bytes(b"hello"), "download it again"),
    "html": (lambda path: path.write_bytes(b"<html>not found</html>"), "download it again"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
             "download it again"),
    "lfs pointer": (lambda path: path.write_text(POINTER),
                    "is git's pointer to the file: run 'git lfs pull'"),
    "directory": (lambda path: (path.unlink(), path.mkdir()), "is a directory, not"),
    "dangling link": (lambda path: (path.unlink(), path.symlink_to("../blobs/00")),
                      r"is a link to \.\./blobs/00, which does not exist: download it again"),
    "nested": (lambda path: path.write_text("[" * 100000), "download it again"),
    "list": (lambda path: path.write_text("[]"), "download it again"),
}  # fmt: skip
READ = ["tokenizer.model", "tokenizer.json", "added_tokens.json", "special_tokens_map.json"]


@pytest.mark.parametrize("damage", UNREADABLE)
@pytest.mark.parametrize("name", [*READ, "tokenizer_config.json"])
def test_unreadable_files(written, tmp_path, name, damage):
    copy(written, tmp_path, *READ, "5/tokenizer_config.json")
    make_unreadable, remedy = UNREADABLE[damage]
    make_unreadable(tmp_path / name)
    with pytest.raises(PaliGemmaError, match=rf"^{re.escape(str(tmp_path / name))} .*{remedy}") as caught:
        Tokenizer.load(tmp_path, CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_with_a_byte_order_mark_or_in_utf_16(written, tmp_path, encoding):
    for file in (*FILES, "tokenizer.json"):
        (tmp_path / file).write_bytes((written / file).read_text("utf-8").encode(encoding))
    expected = Tokenizer.load(written, CONFIG).encode("é x 猫")
    assert Tokenizer.load(tmp_path, CONFIG).encode("é x 猫") == expected


def test_a_piece_that_is_not_utf_8(model):
    at = model.index("▁dog".encode())
    message = r"tokenizer\.model is not a tokenizer .*utf-8.*: download it again"
    with pytest.raises(PaliGemmaError, match=message):
        Tokenizer(model[:at] + b"\xff" + model[at + 1 :], CONFIG)


LISTED = "added_tokens_decoder"
UNUSABLE = [  # the file, the key of the value in it, the value, and the words of the error
    ("tokenizer_config.json", [LISTED], 5, f"{LISTED} is 5; it must be an object"),
    ("tokenizer_config.json", [LISTED, "x"], {"content": "x"}, "has the id 'x'; it must be a token id"),
    ("tokenizer_config.json", [LISTED, "9" * 30], {"content": "x"},
     "has the id '9999.*; it must be a token id"),
    ("tokenizer_config.json", [LISTED, "1700"], {"content": "x x"}, "'x x' is 1700, but the next free id"),
    ("tokenizer_config.json", [LISTED, "1603"], "x", f"{LISTED} 1603 is 'x'; it must be an object"),
    ("tokenizer_config.json", [LISTED, "1603", "content"], None, "content is None; it must be a string"),
    ("tokenizer_config.json", [LISTED, "1603", "content"], "\ud800", r"content is .*ud800.; it must be text"),
    ("tokenizer_config.json", [LISTED, "1603", "lstrip"], "no", "lstrip is 'no'; it must be true or false"),
    ("tokenizer_config.json", [LISTED, "1602", "content"], "<other>",
     "'<other>' is 1602, but the next free id.* is 1603"),
    ("tokenizer_config.json", ["additional_special_tokens"], "x", "is 'x'; it must be a list"),
    ("tokenizer_config.json", ["extra_special_tokens"], [5], "is 5; it must be an object"),
    ("tokenizer_config.json", ["extra_special_tokens"], {"a": 5}, "is 5; it must be an object"),
    ("added_tokens.json", ["<box>"], "x", "'<box>' has the id 'x'; it must be a token id"),
    ("added_tokens.json", ["<box>"], -1, "'<box>' has the id -1"),
    ("added_tokens.json", ["<box>"], 1 << 80, "'<box>' has the id 1208925819614629174706176"),
    ("added_tokens.json", ["<new>"], 1650,
     "'<new>' is 1650, but the next free id, which transformers gives it, is 16..: number"),
    ("added_tokens.json", ["<image>"], 1601,
     "<image> is 1601, config.json's 1602: they are not of one checkpoint"),
    ("special_tokens_map.json", ["extra_special_tokens"], 5, "is 5; it must be a list"),
    ("special_tokens_map.json", ["bos_token"], {"lstrip": True}, "bos_token has no 'content'"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "keys", "value", "problem"), UNUSABLE, ids=str)
def test_unusable_values_are_named(written, tmp_path, file, keys, value, problem):
    config = ["tokenizer_config.json"] if file == "tokenizer_config.json" else []
    copy(written, tmp_path, "tokenizer.model", "added_tokens.json", "special_tokens_map.json", *config)
    content = json.loads((tmp_path / file).read_text("utf-8"))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / file).write_text(json.dumps(content), "utf-8")
    with pytest.raises(PaliGemmaError, match=f"^{file}: .*{problem}") as caught:
        Tokenizer.load(tmp_path, CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", *FILES])
def test_damaged_files_load_or_raise_one_line(written, tmp_path, name):
    """Bytes are changed, moved and cut at random. A tokenizer that loads encodes and decodes."""
    files = ["tokenizer.model", *FILES]
    if name == "tokenizer.json":
        files = ["tokenizer.json"]
    elif name not in ("tokenizer.model", "tokenizer_config.json"):
        files = ["tokenizer.model", "tokenizer.json", *FILES[1:]]
    copy(written, tmp_path, *files)
    inserted = [b"9", b'"', b"null", b"{", b"-1e999", b"\xff", b"\\ud800", b"true", b"\n"]
    original, rng, refused = (tmp_path / name).read_bytes(), np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(original)
        for at in rng.integers(0, len(damaged), rng.integers(1, 5)):
            kind = rng.integers(4)
            if kind == 0:
                damaged[at % len(damaged)] = rng.integers(256)
            elif kind == 1:
                del damaged[at : at + rng.integers(1, 30)]
            elif kind == 2:
                damaged[at:at] = rng.choice(inserted)
            else:
                damaged[at:at] = damaged[at // 2 : at // 2 + rng.integers(1, 60)]
        (tmp_path / name).write_bytes(damaged)
        message = ""
        try:
            tokenizer = Tokenizer.load(tmp_path, CONFIG)
            ids = tokenizer.encode("the cat <box> a b <loc0001>\n é 猫")
        except PaliGemmaError as error:
            message = str(error)
        assert len(message.splitlines()) <= 1
        refused += bool(message)
        if not message:
            assert isinstance(tokenizer.decode(ids), str)
            assert [tokenizer.piece(i) for i in ids]
    assert refused > 3


def test_no_tokenizer(tmp_path):
    with pytest.raises(PaliGemmaError, match=r"no tokenizer.model and no tokenizer.json"):
        Tokenizer.load(tmp_path, CONFIG)


@pytest.mark.parametrize(("change", "problem"), [
    ({"bos_token_id": 1}, "<bos> is 2, config.json's 1"),
    ({"text": {"vocab_size": 1599}}, "1600 pieces, the model 1599"),
])  # fmt: skip
def test_tokenizer_of_another_checkpoint(tokenizer_model, change, problem):
    with pytest.raises(PaliGemmaError, match=problem):
        Tokenizer(tokenizer_model, PaliGemmaConfig.from_dict(config_dict(**change)))
