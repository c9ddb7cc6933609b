"""Tokens that a fine-tune added are transformers', whichever files list them; a file that is damaged is named with the remedy."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import config_dict, train_tokenizer
from conftest import photo
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processor import peer_images, theirs

from paligemma.added_tokens import FILES, AddedToken, _is_space, _is_word
from paligemma.config import PaliGemmaConfig
from paligemma.errors import PaliGemmaError
from paligemma.processor import Processor
from paligemma.tokenizer import Tokenizer, TextStream, needs_json

SIZE = 1602  # of the vocabulary: transformers has a <mask> in every one
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
    # of the vocabulary
    AddedToken("cat"),
    AddedToken("<turn>", special=True, normalized=False),
    AddedToken("▁dog", normalized=False),
    AddedToken("red", single_word=True),
    AddedToken("▁left"),
    AddedToken("ct", lstrip=True),
]
FRAGMENTS = [token.content for token in ADDED[1:]] + [
    " ", "  ", "\n", "\n\n", "\t", "\u3000", "\x1c", "a", "b", "s", "cat", " cat", "con", "words", "dword", "é", "é x", "▁", "the dog", "dogs", "reds", "left", " left", "circle", "<",
    "<mask>", "<loc0001>", "<seg001>", "<loc9999>", "<bo", "x>", "_", "-", "\u200d", "\u0301", "ⓐ", "😀",
]  # fmt: skip
TEXTS = (
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join).filter(lambda text: not re.search("<(bos|eos|pad|unk|image)>", text))
)


def without(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).unlink()


def as_transformers_4(directory: Path, model: bytes, tokenizer) -> None:
    """The files that transformers 4 writes, beside the tokenizer.json of transformers 5, which is the same."""
    (directory / "tokenizer.model").write_bytes(model)
    flags = {i: {name: getattr(token, name) for name in asdict(ADDED[0])} for i, token in tokenizer.added_tokens_decoder.items()}
    extra = [token["content"] for token in flags.values() if token["special"] and token["content"] not in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")]
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    written = {"add_bos_token": True, "added_tokens_decoder": flags, "additional_special_tokens": extra, **names, "tokenizer_class": "GemmaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(written))
    (directory / "added_tokens.json").write_text(json.dumps({token["content"]: i for i, token in flags.items() if i >= SIZE - 1}))
    special = {token["content"]: {name: value for name, value in token.items() if name != "special"} for token in flags.values()}
    by_name = {key: special[name] for key, name in names.items()}
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [special[name] for name in extra], **by_name}))


LAYOUTS = {
    "transformers 5": ["5/tokenizer.json", "5/tokenizer_config.json"],
    "transformers 4": ["tokenizer.model", "tokenizer.json", *FILES],
    "transformers 4, slow": ["tokenizer.model", *FILES],
    "transformers 5 over an old tokenizer.model": ["tokenizer.model", "tokenizer.json", "5/tokenizer_config.json"],
    "transformers 4 without tokenizer_config.json": ["tokenizer.model", "tokenizer.json", "added_tokens.json"],
    "tokenizer.json alone": ["tokenizer.json"],
    "tokenizer.json and the configuration of transformers 4": ["tokenizer.json", "tokenizer_config.json"],
    "added_tokens.json beside tokenizer.model": ["tokenizer.model", "added_tokens.json"],
    "added_tokens.json and special_tokens_map.json beside tokenizer.model": ["tokenizer.model", "added_tokens.json", "special_tokens_map.json"],
    "tokenizer.model alone": ["tokenizer.model"],
}


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer("<mask>", "<turn>")


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    """All files that transformers 4 writes for a tokenizer with added tokens; in 5/ those of transformers 5."""
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


class Both:
    """With the short repr that a failure prints."""

    def __init__(self, ours: Processor, peer):
        self.ours, self.peer = ours, peer


@pytest.fixture(scope="module", params=LAYOUTS)
def both(request, written, tmp_path_factory) -> "Both":
    """Our tokenizer and transformers', of the same directory."""
    from transformers import GemmaTokenizer, PaliGemmaProcessor

    directory = tmp_path_factory.mktemp("layout")
    for name in LAYOUTS[request.param]:
        shutil.copy(written / name, directory)
    peer = PaliGemmaProcessor(peer_images(56), GemmaTokenizer.from_pretrained(directory))
    return Both(Processor.load(directory, CONFIG), peer)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_ids_and_text_are_transformers(both, text):
    ours, peer = both.ours.tokenizer, both.peer.tokenizer
    ids = ours.encode(text)
    assert ids == peer.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert ours.decode(ids, skip) == peer.decode(ids, skip_special_tokens=skip)
    assert "".join(ours.texts(ids)) == ours.decode(ids)


def test_every_id_is_transformers(both):
    ours, peer = both.ours.tokenizer, both.peer.tokenizer
    ids = range(len(peer))
    assert [ours.piece(i).replace(" ", "▁") for i in ids] == [token.replace(" ", "▁") for token in peer.convert_ids_to_tokens(list(ids))]
    bytes_ = range(ours.pieces.piece_to_id("<0x00>"), ours.pieces.piece_to_id("<0xFF>") + 1)  # of which transformers makes � one by one
    for skip in (True, False):
        assert [ours.decode(i, skip) for i in ids if i not in bytes_] == [peer.decode([i], skip_special_tokens=skip) for i in ids if i not in bytes_]


def test_prompts_and_suffixes_are_transformers(both):
    prompts = ["", "<box> a b", " <both> cat", "detect <left>", "word", "words", "猫", "find a b\nred"]
    images = [photo(9, 9)] * len(prompts)
    for suffixes in (None, [*prompts[1:], "<loc0001> a b"]):
        ours = both.ours.arrays(prompts, images, suffixes)
        wanted = theirs(both.peer, prompts, **({} if suffixes is None else {"suffix": suffixes}))
        if suffixes is not None:
            wanted = {name: array[:, :-1] for name, array in wanted.items() if name != "pixel_values"}  # without <eos>
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)


def test_spelled_control_tokens_stay_text(both):
    for word in ("<bos>", "<eos>", "<pad>", "<unk>", "<image>"):
        ids = both.ours.tokenizer.encode(f"a{word} b <box>{word}")
        assert not {0, 1, 2, 3, SIZE} & set(ids)
        assert both.ours.tokenizer.decode(ids) == f"a{word} b <box>{word}"
