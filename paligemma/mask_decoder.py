"""The documented place of `MaskDecoder`, which is in answers/masks.py."""

from .answers.masks import MaskDecoder as MaskDecoder
