"""The pieces of a tokenizer and their ids: read from tokenizer.model, or from tokenizer.json if that is the
only file or has another vocabulary."""

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
    """A SentencePiece model."""

    model: bytes  # the serialised model
    pieces: sentencepiece.SentencePieceProcessor  # the loaded model
    names: list[str]  # of its pieces, by id
    file: str  # from which it was read

    @classmethod
    def load(cls, model: bytes, file: str) -> "Vocabulary":
        """Raises PaliGemmaError for a model that SentencePiece cannot read."""
        try:
            if not model:
                raise RuntimeError("it is empty")  # SentencePiece takes b"" as no argument
            pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            names = pieces.id_to_piece(list(range(len(pieces))))
        except (RuntimeError, UnicodeDecodeError) as error:
            problem = f"is not a tokenizer that SentencePiece reads ({' '.join(str(error).split())})"
            raise PaliGemmaError(f"{file} {problem}: download it again") from None
        if pieces.bos_id() < 0:
            problem = "has no <bos>: it is not complete, or not PaliGemma's"
            raise PaliGemmaError(f"{file} {problem}; download it again")
        return cls(model, pieces, names, file)


def read(path: Path) -> tuple[Vocabulary, dict | None]:
    """The vocabulary of a file or a directory; and the parsed tokenizer.json, if it may be the only file that
    lists added tokens.

    If a directory has tokenizer.model and tokenizer.json and their pieces differ, the vocabulary was changed
    after tokenizer.model was written: tokenizer.json is used, as in transformers. Raises PaliGemmaError with
    the remedy."""
    if not os.path.isdir(path):
        if path.suffix != ".json":
            return Vocabulary.load(read_bytes(path), str(path)), None
        parsed = read_json(path)
        return Vocabulary.load(sentencepiece_model(parsed), str(path)), parsed
    model, json = path / MODEL, path / JSON
    if not os.path.lexists(model):
        if not os.path.lexists(json):
            remedy = "give one with --tokenizer (tokenizer=...)"
            raise PaliGemmaError(f"{path} has no {MODEL} and no {JSON}: {remedy}")
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
        problem = f"{model} and {JSON} have different pieces ({error})"
        raise PaliGemmaError(f"{problem}: delete the one that is not this checkpoint's") from None


def _beginning(file: Path) -> bytes:
    """The first 16 MiB of a file; nothing if it cannot be read: a later read of the whole file says why."""
    try:
        with open(file, "rb") as f:
            return f.read(1 << 24)
    except OSError:
        return b""


def needs_json(directory: Path) -> bool:
    """Whether tokenizer.json must be read beside a tokenizer.model, because it may be the only file that
    lists added tokens."""
    return not added_tokens.lists_all(directory)
