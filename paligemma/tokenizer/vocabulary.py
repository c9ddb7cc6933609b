"""The pieces of a tokenizer and their ids: from tokenizer.model, or from the tokenizer.json of a checkpoint
that has only that, or another vocabulary in it."""

import os
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from ..errors import PaliGemmaError
from ..files import read_bytes, read_json
from . import added_tokens
from .json_model import agrees, lists_pieces, sentencepiece_model

MODEL, JSON = "tokenizer.model", "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model, serialised and loaded, the names of its pieces by id, and the file that it is
    from."""

    model: bytes
    pieces: sentencepiece.SentencePieceProcessor
    names: list[str]
    file: str

    @classmethod
    def load(cls, model: bytes, file: str) -> "Vocabulary":
        """Raises PaliGemmaError for what SentencePiece does not read."""
        try:
            if not model:
                raise RuntimeError("it is empty")  # which SentencePiece would take for no model at all
            pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            names = pieces.id_to_piece(list(range(len(pieces))))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise PaliGemmaError(
                f"{file} is not a tokenizer that SentencePiece reads ({' '.join(str(error).split())}): download it again"
            ) from None
        if pieces.bos_id() < 0:
            raise PaliGemmaError(
                f"{file} has no <bos>: it is not whole, or not PaliGemma's; download it again"
            )
        return cls(model, pieces, names, file)


def read(path: Path) -> tuple[Vocabulary, dict | None]:
    """The vocabulary in a file, or in a directory; and the parsed tokenizer.json, where the directory may
    list added tokens in no other file.

    Where tokenizer.model and tokenizer.json are both there and their pieces differ, the vocabulary was
    changed after tokenizer.model was written: tokenizer.json counts, as for transformers. Raises
    PaliGemmaError with the remedy."""
    if not os.path.isdir(path):
        if path.suffix != ".json":
            return Vocabulary.load(read_bytes(path), str(path)), None
        parsed = read_json(path)
        return Vocabulary.load(sentencepiece_model(parsed), str(path)), parsed
    model, json = path / MODEL, path / JSON
    if not os.path.lexists(model):
        if not os.path.lexists(json):
            raise PaliGemmaError(
                f"{path} has no {MODEL} and no {JSON}: give one with --tokenizer (tokenizer=...)"
            )
        return read(json)
    vocabulary, needed = Vocabulary.load(read_bytes(model), str(model)), needs_json(path)
    if not os.path.lexists(json):
        return vocabulary, None
    same = lists_pieces(_beginning(json), vocabulary.names)
    parsed = read_json(json) if needed or not same else None
    if parsed is None or same or agrees(parsed, vocabulary.names):
        return vocabulary, parsed if needed else None
    try:
        return Vocabulary.load(sentencepiece_model(parsed), str(json)), parsed
    except PaliGemmaError as error:
        raise PaliGemmaError(
            f"{model} and {JSON} have different pieces ({error}): delete the one that is not this checkpoint's"
        ) from None


def _beginning(file: Path) -> bytes:
    """The first 16 MB of a file, nothing of one that cannot be read: whoever reads all of it says why."""
    try:
        with open(file, "rb") as f:
            return f.read(1 << 24)
    except OSError:
        return b""


def needs_json(directory: Path) -> bool:
    """Whether tokenizer.json must be read beside a tokenizer.model, because it may be the only file that
    lists added tokens."""
    return not added_tokens.lists_all(directory)
