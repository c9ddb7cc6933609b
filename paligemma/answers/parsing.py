"""Parses the tokens of an answer to objects with label, box, score and mask, and the text around them.

`<loc0102><loc0204><loc0307><loc0409> cat ; ...`: four <loc> tokens are a box, y0 x0 y1 x1 in bins of the side
of the picture; sixteen <seg> tokens after them are a mask in that box. A label follows, which fine-tuned
models may leave out. Objects are separated by semicolons. A part of the answer that breaks this grammar is
not an error: it is returned as text, with a description of the fault, so that no token is lost.

The arithmetic follows Google's evaluator (big_vision, evaluators/proj/paligemma/transfers/segmentation.py),
with bins=1023 for the box as well. With bins=1024 the box is that of all other implementations, beginning
with the demo on Hugging Face's hub. Does not import torch."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import PaliGemmaError
from ..fields import shown
from ..tokenizer import Tokenizer, one_row
from .objects import Answer, Box, Object, Text

CORNERS, CODES = 4, 16  # <loc> tokens of a box, <seg> tokens of a mask
BINS = (1024, 1023)
LOCATION = 0.25  # the power of box_score in score, chosen among others by benchmarks/box_scores.py
SPECIAL = re.compile(r"<(?:loc(\d{4})|seg(\d{3}))>")
# Matches the kinds of marks (see _Mark): an object, or text up to the next semicolon, <loc> or <seg>. In a
# run of 4 n <loc> tokens every four are a box; in a run of another length it is unknown where a box begins.
CLAUSE = re.compile(r" *(L{4}(?=(?:L{4})+(?!L))|L*) *(S*) *([^LS;]*)(?:; *)?")

DecodeMasks = Callable[[np.ndarray], Any]  # codes (N, 16) -> (N, 64, 64), above 0 where the object is


def parse(
    tokenizer: Tokenizer,
    ids,
    image_size: tuple[int, int],
    log_probs=None,
    *,
    bins: int = 1024,
    mask_decoder: DecodeMasks | None = None,
) -> Answer:
    """Parse the tokens of one answer about a picture of (width, height) pixels.

    ids: a list, an array or a tensor (N,) or (1, N), read up to the first end token. log_probs: the
    log-probability of each id, in the same shape, for the scores. bins: 1024, or 1023 for the box of Google's
    evaluator, as in training. mask_decoder: decodes the codes of masks. Raises PaliGemmaError for an invalid
    argument; every sequence of ids is valid."""
    if bins not in BINS:
        raise _wrong("bins", bins, "1024, or 1023 for the box of Google's evaluator")
    try:
        width, height = (int(side) if side == int(side) else 0 for side in image_size)
    except (TypeError, ValueError, OverflowError):  # not two values, or not numbers
        width = height = 0
    if width < 1 or height < 1:
        raise _wrong("image_size", image_size, "the width and the height in pixels")
    ids = one_row(ids)
    if log_probs is not None:
        log_probs = _numbers(log_probs)
        if len(log_probs) != len(ids):
            raise PaliGemmaError(f"{len(log_probs)} log_probs for {len(ids)} ids: there must be one for each")
    end = next((n for n, i in enumerate(ids) if i in tokenizer.eos_token_ids), len(ids))

    marks = _marks(tokenizer, ids[:end])
    size = (width, height)
    parts: list[Object | Text] = []
    for match in CLAUSE.finditer("".join(mark.kind for mark in marks)):
        clause, locs, segs, words = (marks[slice(*match.span(group))] for group in range(4))
        last, part = (parts or [None])[-1], _part(clause, locs, segs, words, size, bins, log_probs)
        if isinstance(part, Text) and isinstance(last, Text) and not (part.fault or last.fault):
            parts[-1] = Text(last.text + part.text)
        elif part.text:
            parts.append(part)
    return Answer(_with_masks(parts, mask_decoder) if mask_decoder else parts, size)


def _wrong(name: str, value: Any, wanted: str) -> PaliGemmaError:
    return PaliGemmaError(f"{name} is {shown(value)}; it must be {wanted}")


def _numbers(log_probs: Any) -> list[float]:
    """The numbers of one row: an array, a tensor or a list, (N,) or (1, N). Raises PaliGemmaError for several
    rows and for a value that is not a number."""
    try:
        row: Any = log_probs.tolist() if hasattr(log_probs, "tolist") else list(log_probs)
        row = [value.tolist() if hasattr(value, "tolist") else value for value in row]  # tensors () or (1,)
        if len(row) == 1 and isinstance(row[0], (list, tuple)):
            row = list(row[0])
        numbers: Any = (value[0] if isinstance(value, list) and len(value) == 1 else value for value in row)
        return [float(value) for value in numbers]
    except (TypeError, ValueError):
        raise _wrong("log_probs", log_probs, "one row of numbers: give the rows one by one") from None


class _Mark(NamedTuple):
    """A <loc> token, a <seg> token, or one character of text."""

    kind: str  # L: <loc>, S: <seg>, ";": a semicolon, " ": white space, t: another character
    text: str
    token: int  # its index among the ids
    value: int = 0  # the number in the <loc> or <seg>


def _marks(tokenizer: Tokenizer, ids: list[int]) -> list[_Mark]:
    marks = []
    for n, (i, text) in enumerate(zip(ids, tokenizer.texts(ids), strict=True)):
        special = SPECIAL.fullmatch(tokenizer.piece(i))
        if special:
            held = text.removesuffix(special[0])  # bytes before it that are not a complete character
            marks += [_mark(c, n) for c in held]
            marks.append(_Mark("L" if special[1] else "S", special[0], n, int(special[1] or special[2])))
        else:
            marks += [_mark(c, n) for c in text]
    return marks


def _mark(character: str, token: int) -> _Mark:
    return _Mark(";" if character == ";" else " " if character.isspace() else "t", character, token)


Marks = list[_Mark]


def _part(
    clause: Marks, locs: Marks, segs: Marks, words: Marks, size, bins: int, log_probs: list[float] | None
) -> Object | Text:
    """The object that a clause of the answer describes, or its text with the fault in it."""
    text, label = ("".join(mark.text for mark in marks) for marks in (clause, words))
    if not locs and not segs:
        return Text(text)
    if not locs:
        return Text(text, f"{_count(segs, '<seg>')} without a box")
    if len(locs) != CORNERS:
        return Text(text, f"{_count(locs, '<loc>')} where a box has {CORNERS}")
    if len(segs) not in (0, CODES):
        return Text(text, f"{_count(segs, '<seg>')} where a mask has {CODES}")
    y0, x0, y1, x1 = (mark.value for mark in locs)
    if y0 >= y1 or x0 >= x1:
        return Text(text, "the second corner is not below and right of the first")
    box = _pixels((x0, y0, x1, y1), size, bins)
    if box[0] >= box[2] or box[1] >= box[3]:
        return Text(text, f"the box is less than a pixel of {size[0]} x {size[1]}")
    codes = tuple(mark.value for mark in segs)
    if log_probs is None:
        return Object(label.strip(), box, None, codes, None, size, text)
    box_score, label_score = _scores(locs, segs, words, log_probs)
    score = label_score * box_score**LOCATION
    return Object(label.strip(), box, score, codes, None, size, text, box_score, label_score)


def _scores(locs: Marks, segs: Marks, words: Marks, log_probs: list[float]) -> tuple[float, float]:
    """The box_score and the label_score of an object."""
    named = [mark.token for mark in words if mark.kind != " "]
    label = log_probs[(*locs, *segs)[-1].token + 1 : named[-1] + 1] if named else []  # each byte token too
    return math.exp(sum(log_probs[mark.token] for mark in locs) / CORNERS), math.exp(sum(label))


def _count(marks: list[_Mark], name: str) -> str:
    return f"{len(marks)} {name} token{'s' if len(marks) > 1 else ''}"


def _pixels(corners: Box, size: tuple[int, int], bins: int) -> Box:
    """The corners in pixels, from corners in bins."""
    to_pixel = round if bins == 1024 else int
    sides = zip(corners, (*size, *size), strict=True)
    x0, y0, x1, y1 = (to_pixel(value / bins * side) for value, side in sides)
    return x0, y0, x1, y1


def _with_masks(parts: Sequence[Object | Text], mask_decoder: DecodeMasks) -> list[Object | Text]:
    """The parts, with the soft mask of each object that has codes. All masks are decoded together."""
    coded = [part for part in parts if isinstance(part, Object) and part.codes]
    if not coded:
        return list(parts)
    soft = np.asarray(mask_decoder(np.array([part.codes for part in coded])), np.float32)
    masked = iter([replace(part, soft_mask=mask) for part, mask in zip(coded, soft, strict=False)])
    return [next(masked) if isinstance(part, Object) and part.codes else part for part in parts]
