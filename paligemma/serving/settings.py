"""The limits of the server."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..answers.parsing import DecodeMasks

NEW_TOKENS = 100  # of an answer, if the request does not say: the default of all command lines
THREADS = 4  # that read pictures; each may hold one of `max_pixels`


@dataclass(frozen=True)
class Settings:
    """What the server takes, and how much of it."""

    batch_size: int | None = None  # rows that share a decode step; None: what the memory has room for
    queue: int = 64  # requests that wait while `batch_size` others are answered
    timeout: float = 600.0  # seconds from the request to the last token
    body_timeout: float = 60.0  # seconds for the body of a request to arrive
    max_body: int = 20_000_000  # bytes of a request
    max_pixels: int = 50_000_000  # of the pictures of a request, together
    max_new_tokens: int = 1024  # the most that a request may ask for
    api_key: str | None = field(default=None, repr=False)
    local_only: bool = False  # without a key, answer only to a Host that is this machine
    mask_decoder: "DecodeMasks | None" = None  # decodes the masks of the answers, which have none without it
