"""A SentencePiece model from a tokenizer.json, for checkpoints re-saved without their tokenizer.model.

Hugging Face keeps the same BPE vocabulary as a table of pieces and a ranked list of merges. SentencePiece merges the pair
whose result has the highest score, so minus the rank at which a piece is first made is a score that gives the same text
the same pieces. Fields and types: sentencepiece's src/sentencepiece_model.proto.
"""

import re
import struct

from .errors import PaliGemmaError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
NEVER_MERGED = -1e9
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def sentencepiece_model(tokenizer: dict) -> bytes:
    """The serialised ModelProto. Raises PaliGemmaError for a tokenizer.json that is not byte-fallback BPE as Gemma's is."""
    try:
        return _model_proto(tokenizer)
    except KeyError as error:
        problem = f"has no {error}"
    except (TypeError, ValueError) as error:
        problem = f"cannot be used ({error})"
    raise PaliGemmaError(f"tokenizer.json {problem}: add the checkpoint's tokenizer.model")


def _model_proto(tokenizer: dict) -> bytes:
    model = tokenizer["model"]
    if model["type"] != "BPE" or not model["byte_fallback"] or tokenizer["normalizer"] != REPLACE_SPACES:
        raise ValueError("it is not Gemma's kind of tokenizer: BPE with byte fallback, spaces as '▁'")
    ids = dict(model["vocab"])
    if "<0x09>" not in ids:  # some of Gemma's files spell this byte as the tab it is
        ids["<0x09>"] = ids.pop("\t")
    added = {entry["content"]: entry for entry in tokenizer.get("added_tokens", [])}
    ids.update({content: entry["id"] for content, entry in added.items()})
    pieces = sorted(ids, key=lambda piece: ids[piece])
    if [ids[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("its token ids are not 0, 1, 2, ... without a gap")

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
        if piece in ("<pad>", "<eos>", "<bos>", "<image>"):  # never made from text; the processor places them by id
            return CONTROL
        if piece in added or (len(piece) > 1 and piece not in score):
            return USER_DEFINED
        return NORMAL

    out = bytearray()
    for piece in pieces:
        type_ = kind(piece)
        text = piece.encode()
        body = b"\x0a" + _varint(len(text)) + text  # 1: piece
        body += b"\x15" + _float32(score.get(piece, NEVER_MERGED) if type_ == NORMAL else 0.0)  # 2: score
        body += b"\x18" + _varint(type_)  # 3: type
        out += b"\x0a" + _varint(len(body)) + body  # ModelProto 1: pieces
    # ModelProto 2: trainer_spec {3: model_type BPE, 35: byte_fallback, 40-43: unk, bos, eos and pad ids, 45-48: their pieces}
    trainer = b"\x18\x02" + _tag(35) + b"\x01"
    for field, piece in ((40, unknown), (41, "<bos>"), (42, "<eos>"), (43, "<pad>")):
        trainer += _tag(field) + _varint(ids[piece]) + _tag(field + 5, 2) + _varint(len(piece.encode())) + piece.encode()
    out += b"\x12" + _varint(len(trainer)) + trainer
    # ModelProto 3: normalizer_spec {1: name, 3: add_dummy_prefix, 4: remove_extra_whitespaces, 5: escape_whitespaces}
    spec = b"\x0a\x08identity" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
    out += b"\x1a" + _varint(len(spec)) + spec
    return bytes(out)


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
