"""From a request to the input of the model: the prompt, the pictures and the options, checked."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PaliGemmaError
from ..fields import shown
from ..images import open_image
from ..options import Sampling
from ..pictures import MOST
from .errors import Refused
from .request import ChatRequest, ImagePart
from .settings import NEW_TOKENS, Settings

if TYPE_CHECKING:
    from ..processor import Processor

DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.IGNORECASE)
# Pillow decodes others in Python, which takes a minute for a large picture, or before their size is known.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF")
CHARACTERS = 100_000  # of a prompt; more than the context of any model, and the tokenizer takes 0.1 s
HOW = "give a data URL: data:image/png;base64,... with the file in base64"


@dataclass(frozen=True)
class Question:
    """What a request asks for."""

    prompt: str
    pictures: list[str] = field(repr=False)  # data URLs
    count: int  # the most new tokens
    sampling: Sampling
    stops: tuple[str, ...]


def read(body: ChatRequest, settings: Settings) -> Question:
    """The question of a request. Raises Refused."""
    content, name = body.messages[0].content, "messages.0.content"
    parts = [] if isinstance(content, str) else content
    texts = [content] if isinstance(content, str) else [part.text for part in parts if part.type == "text"]
    if len(texts) != 1:
        raise Refused(
            400, f"there are {len(texts)} text parts: give one, which is the prompt as it is", param=name
        )
    if len(texts[0]) > CHARACTERS:
        long = f"the prompt has {len(texts[0]):,} characters, and {CHARACTERS:,} are the most"
        raise Refused(400, f"{long}: shorten it", "context_length_exceeded", name)
    if re.search("[\ud800-\udfff]", texts[0]):  # half of a surrogate pair
        raise Refused(400, f"{shown(texts[0])} is not Unicode text", "invalid", name)
    pictures = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    if not 1 <= len(pictures) <= MOST:
        remedy = f"a prompt is about 1 to {MOST} pictures, each an image_url part with a data URL"
        raise Refused(400, f"there are {len(pictures)} pictures: {remedy}", param=name)
    if body.stream_options and not body.stream:
        raise Refused(400, "stream_options goes with stream: true", param="stream_options")
    one, other = body.max_tokens, body.max_completion_tokens
    if one and other and one != other:
        raise Refused(
            400, "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens"
        )
    count = one or other or min(NEW_TOKENS, settings.max_new_tokens)
    if count > settings.max_new_tokens:
        limit = f"this server gives at most {settings.max_new_tokens}"
        raise Refused(400, f"max_tokens is {count}; {limit}", param="max_tokens")
    top_p = 1.0 if body.top_p is None else body.top_p
    seed = None if body.seed is None else body.seed % 2**63  # OpenAI takes negative ones
    sampling = Sampling.asked(None, body.temperature, top_p, seed)
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Question(texts[0], pictures, count, sampling, stops)


def prepare(
    question: Question, processor: "Processor", settings: Settings
) -> tuple[Mapping[str, Any], tuple[int, int]]:
    """The inputs of the model, and the width and height of the first picture. Raises Refused."""
    import torch

    left, images = settings.max_pixels, []
    for n, url in enumerate(question.pictures):
        param = f"image {n + 1}"
        try:
            images.append(open_image(decoded(url), most_pixels=left, formats=FORMATS))
        except PaliGemmaError as error:
            raise Refused(400, f"{param}: {error}", "invalid_image", "messages.0.content") from None
        left -= images[-1].width * images[-1].height
    try:
        arrays = processor.arrays(question.prompt, [images])
    except PaliGemmaError as error:  # the prompt and its pictures exceed the context
        raise Refused(400, str(error), "context_length_exceeded", "messages") from None
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, images[0].size


def decoded(url: str) -> bytes:
    """The bytes of a data URL. Raises PaliGemmaError."""
    if re.match(r"https?:", url, re.IGNORECASE):
        raise PaliGemmaError(f"the URL is http, and this server fetches nothing: {HOW}")
    head = DATA_URL.match(url, 0, 200)
    if not head:
        raise PaliGemmaError(f"it is not a data URL: {HOW}")
    if not head[3]:
        raise PaliGemmaError(f"the data URL is not in base64: {HOW}")
    try:
        return base64.b64decode(url[head.end() :].encode(), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise PaliGemmaError(f"its base64 is wrong ({error}): {HOW}") from None
