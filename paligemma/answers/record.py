"""An answer as a JSON object, which docs/json.md describes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .parsing import Answer


def record(
    model: str, prompt: str, answer: Answer, finish_reason: str, masks: Sequence[Path | None] = ()
) -> dict[str, Any]:
    """The fields that every answer has: what was asked, the text, its objects and its faults.

    masks: the path of each object's mask, or None, if masks were written."""
    objects = []
    for n, o in enumerate(answer.objects):
        found = {"label": o.label, "box": o.box, "score": o.score and round(o.score, 6)}
        path = masks[n] if masks else None
        objects.append(found | ({"mask": str(path)} if path else {}))
    width, height = answer.image_size
    asked = {"model": model, "image": {"width": width, "height": height}, "prompt": prompt}
    faults = [{"text": part.text, "fault": part.fault} for part in answer.faults]
    said = {"text": answer.text, "objects": objects, "faults": faults, "finish_reason": finish_reason}
    return {**asked, **said}


def details(tokens: Sequence[int], log_probs: Sequence[float]) -> dict[str, Any]:
    """The token ids, and their log-probabilities."""
    return {"tokens": list(tokens), "log_probs": [round(value, 6) for value in log_probs]}
