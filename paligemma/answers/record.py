"""An answer as a JSON object, which docs/json.md describes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .objects import Answer, Object


def record(
    model: str,
    prompt: str,
    answer: Answer,
    finish_reason: str,
    masks: Sequence[Path | None] = (),
    sizes: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """The fields that every answer has: what was asked, the text, its objects and its faults.

    masks: the path of each object's mask, or None, if masks were written. sizes: width and height of each
    image, if there are several; the boxes are in pixels of the first."""
    objects = [described(o) for o in answer.objects]
    for found, path in zip(objects, masks, strict=bool(masks)):
        found |= {"mask": str(path)} if path else {}
    images = [{"width": width, "height": height} for width, height in sizes or [answer.image_size]]
    pictured = {"image": images[0]} if len(images) == 1 else {"images": images}
    asked = {"model": model, **pictured, "prompt": prompt}
    said = {"text": answer.text, "objects": objects, "faults": faults(answer), "finish_reason": finish_reason}
    return {**asked, **said}


def described(o: Object) -> dict[str, Any]:
    """The fields of an object, without its mask."""
    scores = {"score": o.score, "box_score": o.box_score, "label_score": o.label_score}
    return {"label": o.label, "box": o.box} | {k: v and round(v, 6) for k, v in scores.items()}


def faults(answer: Answer) -> list[dict[str, str]]:
    return [{"text": part.text, "fault": part.fault} for part in answer.faults]


def details(tokens: Sequence[int], log_probs: Sequence[float]) -> dict[str, Any]:
    """The token ids, and their log-probabilities."""
    return {"tokens": list(tokens), "log_probs": [round(value, 6) for value in log_probs]}
