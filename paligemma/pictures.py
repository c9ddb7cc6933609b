"""The pictures that a command line names: images, or frames of a video; "-" is stdin."""

import sys
from typing import TYPE_CHECKING

from .errors import PaliGemmaError

if TYPE_CHECKING:
    from PIL import Image

MOST = 32  # images of a prompt: their 256 tokens each fill the context of the published models


def read_images(paths: list[str]) -> "list[Image.Image]":
    """The images at these paths. Raises PaliGemmaError if one cannot be read."""
    from .images import open_image

    if len(paths) > MOST:
        many = f"--image has {len(paths)} images, and a prompt is about at most {MOST}"
        raise PaliGemmaError(f"{many}: for an answer about each use python -m paligemma.batch")
    if paths.count("-") > 1:
        raise PaliGemmaError("--image has - twice, and stdin has one image: give the path of the other")
    return [open_image(_stdin("image") if path == "-" else path) for path in paths]


def read_video(path: str, frames: int) -> "list[Image.Image]":
    """Frames of the video at a path. Raises PaliGemmaError if it cannot be read, or has fewer frames."""
    from .video import read_frames

    return read_frames(_stdin("video") if path == "-" else path, frames)


def _stdin(kind: str) -> bytes:
    if sys.stdin is None:
        raise PaliGemmaError(f"--{kind} - reads the {kind} from stdin, which is closed")
    return sys.stdin.buffer.read()
