"""Converts a tokenizer.json to a SentencePiece model, for checkpoints saved without their tokenizer.model.

Hugging Face stores the same BPE vocabulary as a table of pieces and a ranked list of merges. SentencePiece
merges the pair whose result has the highest score. If the score of a piece is minus the rank of the first
merge that results in it, both split a text into the same pieces. The fields and their types are those of
sentencepiece's src/sentencepiece_model.proto."""

import json
import re
import struct
from itertools import chain

from ..errors import PaliGemmaError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
NEVER_MERGED = -1e9
TAB, TAB_BYTE = "\t", "<0x09>"  # some of Gemma's files write this byte's piece as a tab
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SEQUENCE = {"type": "Sequence", "normalizers": [REPLACE_SPACES]}  # another form of the same normalizer


def sentencepiece_model(tokenizer: dict) -> bytes:
    """The serialised ModelProto of the vocabulary of a parsed tokenizer.json, without added tokens, which
    added_tokens.py reads. Raises PaliGemmaError if it is not byte-fallback BPE like Gemma's."""
    try:
        return _model_proto(tokenizer)
    except KeyError as error:
        problem = f"has no {error}"
    except (AttributeError, TypeError, ValueError) as error:
        problem = f"cannot be used ({error})"
    raise PaliGemmaError(f"tokenizer.json {problem}: add the checkpoint's tokenizer.model")


def lists_pieces(data: bytes, pieces: list[str]) -> bool:
    """Whether the vocabulary in the bytes of a tokenizer.json consists of these pieces, or of the first of
    them, by id. False if that is not certain.

    The bytes are compared with the text that the tokenizers library would write, which is much faster than
    parsing them. The result for a file in another layout is False."""
    begin = re.search(rb'"vocab": \{\n      ', data)
    if not begin or not pieces:
        return False
    written = data[begin.end() : data.find(b"\n    }", begin.end())] + b","
    escaped = json.dumps(pieces, ensure_ascii=False)[2:-2].split('", "')
    numbered = tuple(chain.from_iterable(zip(escaped, range(len(escaped)), strict=True)))
    text = '"%s": %d,\n      ' * len(escaped) % numbered
    texts = (text, text.replace(f'"{TAB_BYTE}":', '"\\t":'))
    return any(spelled.encode().startswith(written) for spelled in texts)


def agrees(tokenizer: dict, pieces: list[str]) -> bool:
    """Whether the vocabulary of a parsed tokenizer.json consists of these pieces, or of the first of them, by
    id; True if it has no vocabulary."""
    try:
        ids = pieces_by_id(tokenizer)
    except (KeyError, AttributeError, TypeError, ValueError):
        return True
    return all(type(i) is int and 0 <= i < len(pieces) and pieces[i] == piece for piece, i in ids.items())


def pieces_by_id(tokenizer: dict) -> dict[str, int]:
    """The vocabulary of a parsed tokenizer.json: the id of each piece."""
    ids = dict(tokenizer["model"]["vocab"])
    if TAB_BYTE not in ids:
        ids[TAB_BYTE] = ids.pop(TAB)
    return ids


def _model_proto(tokenizer: dict) -> bytes:
    model = tokenizer["model"]
    is_gemma = model["type"] == "BPE" and model["byte_fallback"]
    if not is_gemma or tokenizer["normalizer"] not in (REPLACE_SPACES, SEQUENCE):
        raise ValueError("it is not Gemma's kind of tokenizer: BPE with byte fallback, spaces as '▁'")
    ids = pieces_by_id(tokenizer)
    pieces = sorted(ids, key=lambda piece: ids[piece])
    if [ids[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("the ids of its vocabulary are not 0, 1, 2, ... without a gap")
    added = {entry["content"]: _is_found_anywhere(entry) for entry in tokenizer.get("added_tokens", [])}

    score: dict[str, float] = {}
    for merge in model["merges"]:  # "a b", or ["a", "b"] since tokenizers 0.20
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        score.setdefault(left + right, -float(len(score)))
    unknown = model.get("unk_token", "<unk>")

    def kind(piece: str) -> int:
        if piece == unknown:
            return UNKNOWN
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return BYTE
        if piece in ("<pad>", "<eos>", "<bos>", "<image>"):  # not encoded from text, but inserted by id
            return CONTROL
        if added.get(piece):
            return USER_DEFINED
        if len(piece) == 1 or piece in score:
            return NORMAL
        return UNUSED  # no merge results in it, so that no text contains it

    out = bytearray()
    for piece in pieces:
        type_ = kind(piece)
        text = piece.encode()
        body = b"\x0a" + _varint(len(text)) + text  # 1: piece
        body += b"\x15" + _float32(score.get(piece, NEVER_MERGED) if type_ == NORMAL else 0.0)  # 2: score
        body += b"\x18" + _varint(type_)  # 3: type
        out += b"\x0a" + _varint(len(body)) + body  # ModelProto 1: pieces
    # ModelProto 2: trainer_spec {3: model_type BPE, 35: byte_fallback, 40-43: unk, bos, eos and pad ids,
    # 45-48: their pieces}
    trainer = b"\x18\x02" + _tag(35) + b"\x01"
    for field, piece in ((40, unknown), (41, "<bos>"), (42, "<eos>"), (43, "<pad>")):
        id_, text = _varint(ids[piece]), piece.encode()
        trainer += _tag(field) + id_ + _tag(field + 5, 2) + _varint(len(text)) + text
    out += b"\x12" + _varint(len(trainer)) + trainer
    # ModelProto 3: normalizer_spec {1: name, 3: add_dummy_prefix, 4: remove_extra_whitespaces, 5:
    # escape_whitespaces}
    spec = b"\x0a\x08identity" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
    out += b"\x1a" + _varint(len(spec)) + spec
    return bytes(out)


def _is_found_anywhere(entry: dict) -> bool:
    """Whether an added token is recognised wherever it occurs in the text, as a user-defined piece of
    SentencePiece is. SentencePiece sees spaces as "▁". Other added tokens are left to added_tokens.py."""
    content = entry["content"]
    spells_spaces = "▁" in content and content.strip("▁") != "" and not entry.get("normalized", True)
    return not (entry.get("single_word") or spells_spaces)


def user_defined_pieces(model: bytes) -> list[int]:
    """The ids of the user-defined pieces of a serialised ModelProto; sentencepiece has no function for it."""
    ids, at, i = [], 0, 0
    while at + 3 < len(model) and model[at] == 0x0A:  # 1: pieces, each with its type as the last field
        length = model[at + 1]
        at += 2
        if length > 127:
            length = length & 127 | model[at] << 7
            at += 1
        at += length
        if model[at - 2 : at] == b"\x18\x04":
            ids.append(i)
        i += 1
    return ids


def _tag(field: int, wire_type: int = 0) -> bytes:  # 0: varint, 2: bytes
    return _varint(field << 3 | wire_type)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _float32(x: float) -> bytes:
    return struct.pack("<f", x)
