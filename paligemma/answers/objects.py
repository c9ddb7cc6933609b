"""What an answer consists of: objects with label, box, score and mask, and the text around them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Object:
    """An object that the answer locates in the picture.

    box_score is the geometric mean of the probabilities of the four <loc> tokens, label_score the product of
    the probabilities of the tokens of the label, which is 1 without a label. A token's probability is the
    softmax of the model's own logits, at temperature 1 and before top-p, given all tokens before it.

    score is label_score times the fourth root of box_score. The best of boxes has a low box_score, because
    neighbouring bins share the probability of a corner: if n bins share it evenly, the fourth root is 0.5 for
    n = 16 and 0.3 for n = 123. docs/evaluate.md compares this score with others."""

    label: str  # "" if the answer has none
    box: Box  # x0, y0, x1, y1 in pixels, 0 <= x0 < x1 <= width
    score: float | None  # above 0, at most 1; None without log-probabilities
    codes: tuple[int, ...]  # the mask's 16 numbers from 0 to 127; () without a mask
    soft_mask: np.ndarray | None = field(repr=False, compare=False)  # (64, 64) float32 over the box, or None
    image_size: tuple[int, int]  # width, height
    text: str  # the part of the answer that describes it, with the semicolon after it
    box_score: float | None = None  # as score
    label_score: float | None = None  # as score

    @property
    def box_mask(self) -> np.ndarray | None:  # (y1 - y0, x1 - x0) bool
        """The mask inside the box; None without a soft mask."""
        if self.soft_mask is None:
            return None
        x0, y0, x1, y1 = self.box
        soft = Image.fromarray(self.soft_mask).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        return np.asarray(soft) > 0

    @property
    def mask(self) -> np.ndarray | None:  # (H, W) bool
        """The mask in the whole picture, computed on each access."""
        inside = self.box_mask
        if inside is None:
            return None
        x0, y0, x1, y1 = self.box
        mask = np.zeros(self.image_size[::-1], bool)
        mask[y0:y1, x0:x1] = inside
        return mask


@dataclass(frozen=True)
class Text:
    """A part of the answer that does not describe an object."""

    text: str
    fault: str = ""  # why its <loc> or <seg> tokens are not an object


@dataclass(frozen=True)
class Answer:
    parts: list[Object | Text]  # in order; their texts, joined, are the whole answer
    image_size: tuple[int, int]  # width, height

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def objects(self) -> list[Object]:
        return [part for part in self.parts if isinstance(part, Object)]

    @property
    def faults(self) -> list[Text]:
        return [part for part in self.parts if isinstance(part, Text) and part.fault]

    def detections(self) -> dict[str, Any]:
        """Arrays for `supervision.Detections(**answer.detections())`: xyxy (N, 4) float32; confidence (N,)
        float32, or None without scores; mask (N, H, W) bool, or None if no object has a mask (one without a
        mask gets an empty one); class_id (N,), which numbers the labels in the order of their first use;
        data["class_name"] (N,), the labels."""
        found = self.objects
        labels = list(dict.fromkeys(o.label for o in found))
        masks, scores = [o.mask for o in found], [o.score for o in found]
        empty = np.zeros(self.image_size[::-1], bool)
        masked, scored = any(mask is not None for mask in masks), None not in scores
        return {
            "xyxy": np.array([o.box for o in found], np.float32).reshape(-1, 4),
            "mask": np.stack([empty if mask is None else mask for mask in masks]) if masked else None,
            "confidence": np.array(scores, np.float32) if scored else None,
            "class_id": np.array([labels.index(o.label) for o in found], int),
            "data": {"class_name": np.array([o.label for o in found], str)},
        }
