"""Takes frames of a video, evenly spaced over the whole clip, by PyAV (the extra `video`)."""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from .errors import PaliGemmaError
from .images import Bytes, shown_name, unreadable

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

    Video = str | os.PathLike | Bytes | BinaryIO

INSTALL = "pip install 'paligemma[video]'"
ENOUGH = 0.9  # of the duration in the header; a clip whose packets end before is cut off


def read_frames(source: "Video", count: int = 16) -> list[Image.Image]:
    """`count` frames of a video as upright RGB images, in order: the middle frame of each of `count` equally
    long parts of the clip. Google's checkpoints for videos were trained with 16 frames.

    The source is a path, the bytes of a file, or an open binary file. Raises PaliGemmaError if PyAV is not
    installed, if the video cannot be read, is cut off or has fewer frames, and if the frames together have
    more pixels than Pillow's limit for one image (178,956,970, twice PIL.Image.MAX_IMAGE_PIXELS)."""
    name = shown_name(source, "the video")
    try:
        from av.error import FFmpegError
    except ImportError as error:
        raise PaliGemmaError(f"frames of a video need the package av ({error}): {INSTALL}") from None
    if count < 1:
        raise PaliGemmaError(f"{count} frames are asked for; it must be at least 1")
    try:
        with _file(source) as file:
            if not file.read(1):
                raise PaliGemmaError(f"{name} is empty: it has 0 bytes")
            return [_upright(frame) for frame in _frames(name, file, count)]
    except PaliGemmaError:
        raise
    except FFmpegError as error:
        reason = f"it is damaged or cut off, or in a format that FFmpeg does not read ({error.strerror})"
        raise PaliGemmaError(f"{name} cannot be read as a video: {reason}") from None
    except OSError as error:
        raise unreadable(name, source, error, "a video") from None


@contextmanager
def _file(source: "Video") -> Iterator[BinaryIO]:
    """The video as a file in which any place can be read."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(bytes(source))
    elif isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file if file.seekable() else io.BytesIO(file.read())
    elif hasattr(source, "read"):
        yield source if source.seekable() else io.BytesIO(source.read())
    else:
        wanted = "it must be a path, bytes or an open binary file"
        raise PaliGemmaError(f"the video is a {type(source).__name__}; {wanted}")


def _limit() -> int:
    """The most pixels that all frames together may have."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 1 << 60)


def _check_size(name: str, width: int, height: int, count: int) -> None:
    if width * height * count > _limit():
        most = _limit() // (width * height)
        size = f"{count} frames of {width} x {height} have {width * height * count:,} pixels"
        remedy = f"take at most {most} frames" if most else "scale it down"
        raise PaliGemmaError(f"{name}: {size}; the limit is {_limit():,}: {remedy}")


def _opened(file: BinaryIO) -> "InputContainer":
    """The video, from its start. A playlist can name other files and URLs: none of them is opened."""
    import av

    file.seek(0)
    options = {"protocol_whitelist": "", "max_pixels": str(min(_limit(), 2**31 - 1))}
    return av.open(file, mode="r", options=options)


def _frames(name: str, file: BinaryIO, count: int) -> "list[VideoFrame]":
    from av.error import FFmpegError

    with _opened(file) as container:
        if not container.streams.video:
            raise PaliGemmaError(f"{name} has no pictures that can be read: it is not a video, or is cut off")
        codec = container.streams.video[0].codec_context
        _check_size(name, codec.width, codec.height, count)
        times, keys = _times(name, container)
        if len(times) < count:
            has = f"{name} has {len(times)} frame{'s' * (len(times) != 1)}, and {count} are asked for"
            raise PaliGemmaError(f"{has}: ask for at most {len(times)}" if times else f"{name} has no frames")
        chosen = [(2 * i + 1) * len(times) // (2 * count) for i in range(count)]  # middles of equal parts
        frames: list[VideoFrame] = []
        if None not in times:
            try:
                frames = _sought(container, [sorted(times)[n] for n in chosen], keys)
            except FFmpegError:  # raw streams cannot be sought in
                frames = []
    if not frames:
        with _opened(file) as container:
            frames = _counted(name, container, chosen)
    for frame in frames:
        _check_size(name, frame.width, frame.height, count)
    if len(frames) < count or any(frame.is_corrupt for frame in frames):
        raise PaliGemmaError(f"{name} is damaged: not every frame of it can be decoded")
    return frames


def _sought(container: "InputContainer", times: list[int], keys: list[int]) -> "list[VideoFrame]":
    """The frames at these times. Decoding skips to the last of `keys` before each. Empty if a frame of
    exactly that time is not found, as in formats whose times are inexact."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frames, decoded, reached = [], iter(()), -math.inf
    for time in times:
        key = next((key for key in reversed(keys) if key <= time), times[0])
        if key > reached:
            container.seek(key, stream=stream)
            decoded = container.decode(stream)
        frame = next((f for f in decoded if f.pts is not None and f.pts >= time), None)
        if frame is None or frame.pts != time:
            return []
        frames.append(frame)
        reached = time
    return frames


def _counted(name: str, container: "InputContainer", chosen: list[int]) -> "list[VideoFrame]":
    """The frames with these numbers, from 0 in the order of the clip."""
    stream, numbers, frames = container.streams.video[0], set(chosen), []
    stream.thread_type = "AUTO"
    for n, frame in enumerate(container.decode(stream)):
        if n in numbers:
            _check_size(name, frame.width, frame.height, len(chosen))
            frames.append(frame)
        if n == chosen[-1]:
            break
    return frames


def _times(name: str, container: "InputContainer") -> tuple[list[Any], list[int]]:
    """The time of each frame, None where the file has none, and the sorted times of the frames from which
    decoding can start. Nothing is decoded: files say wrongly how many frames they have, or do not say."""
    times, keys, end = [], [], 0.0
    for packet in container.demux():
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise PaliGemmaError(f"{name} is cut off or damaged: make or fetch the file again")
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is container.streams.video[0] and not packet.is_discard:
            times.append(packet.pts)
            keys += [packet.pts] if packet.is_keyframe and packet.pts is not None else []
    start, duration = ((x or 0) / 1e6 for x in (container.start_time, container.duration))
    if end and end - start < ENOUGH * duration:
        told = f"it is to last {duration:.1f} s and ends after {end - start:.1f} s"
        raise PaliGemmaError(f"{name} is cut off: {told}")
    return times, sorted(keys)


def _upright(frame: "VideoFrame") -> Image.Image:
    """The frame in RGB, turned as its metadata says."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
