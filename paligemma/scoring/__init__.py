"""Scores of answers on a data set, for `python -m paligemma.evaluate`: boxes and masks by COCO's rules, texts
by exact match, VQAv2's rule and ANLS."""

from .rows import detections

__all__ = ["detections"]
