"""The body of a request, with the names of OpenAI's chat completions. What would change the answer and is not
implemented is refused by its name; what changes nothing here is accepted."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

from ..pictures import MOST
from .settings import NEW_TOKENS

PARTS = 2 * MOST  # of a message; limits how many mistakes are listed
STOPS = 4  # stop texts of a request, as at OpenAI
NO_EFFECT = "Has no effect."
ONE_ANSWER = "a request has one answer: send it again for another one, with a temperature"
NO_TOOLS = "PaliGemma calls no tools: leave it out"
NO_PENALTY = "penalties are not implemented: leave it out"
NO_AUDIO = "PaliGemma reads pictures and text, and writes text: leave it out"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {  # field -> the values that change nothing; why no other
    "n": ((1,), ONE_ANSWER),
    "top_logprobs": (
        (0,),
        "only the log-probabilities of the answer's own tokens are returned: leave it out",
    ),
    "response_format": (({"type": "text"},), "PaliGemma cannot be made to write JSON: objects has the boxes"),
    "frequency_penalty": ((0,), NO_PENALTY),
    "presence_penalty": ((0,), NO_PENALTY),
    "logit_bias": (({},), "the logits cannot be changed: leave it out"),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "modalities": ((["text"],), NO_AUDIO),
    "audio": ((), NO_AUDIO),
    "prediction": ((), "a predicted answer is not used: leave it out"),
    "web_search_options": ((), "this server searches nothing: leave it out"),
    "reasoning_effort": (("none",), "PaliGemma does not reason before it answers: leave it out"),
    "verbosity": ((), "the length of an answer cannot be chosen: use max_tokens, or leave it out"),
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str = Field(description="The prompt as it is, such as 'detect cat ; dog'.")


class ImageURL(Strict):
    url: str = Field(description="A data URL: data:image/png;base64,... No other URL is fetched.")
    detail: Literal["auto", "low", "high"] = Field("auto", description=NO_EFFECT)


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


TEXT, LIST = "<text>", "<list>"  # tags of unions; errors leave them out of the name of a field


def tagged(names: dict[Any, str], wanted: str, kind: Callable[[Any], Any] = type) -> Discriminator:
    """Chooses one of a union by the kind of a value, so that an error is about what was meant."""
    return Discriminator(
        lambda value: names.get(kind(value)), custom_error_type="wrong_kind", custom_error_message=wanted
    )


def part_type(part: Any) -> Any:
    found = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return found if isinstance(found, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("<text part>")] | Annotated[ImagePart, Tag("<image part>")],
    tagged(
        {"text": "<text part>", "image_url": "<image part>"},
        "it must be an object whose type is text or image_url", part_type,
    ),
]  # fmt: skip
TAGS = (TEXT, LIST, "<text part>", "<image part>")
KINDS = {str: TEXT, list: LIST}
Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[Part], Field(max_length=PARTS), Tag(LIST)],
    tagged(KINDS, "it must be a text or a list of parts"),
]
Stop = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[str], Field(max_length=STOPS), Tag(LIST)],
    tagged(KINDS, "it must be a text or a list of texts"),
]


class Message(Strict):
    role: str = Field(description="Only user.")
    content: Content = Field(description="One text part and at least one image_url part.")
    name: str | None = Field(None, description=NO_EFFECT)

    @field_validator("role")
    @classmethod
    def only_user(cls, role: str) -> str:
        if role in ("system", "developer"):
            raise ValueError("PaliGemma takes no system message: its prompt is the user's text alone")
        if role != "user":
            raise ValueError("PaliGemma holds no dialogue: send one message, of the role user")
        return role


class StreamOptions(Strict):
    include_usage: bool = Field(False, description="Send the number of tokens in a last chunk.")
    include_obfuscation: bool = Field(False, description=NO_EFFECT)


class ChatRequest(Strict):
    """A prompt about pictures."""

    model: str = Field(description="The name that GET /v1/models lists.")
    messages: list[Message] = Field(min_length=1, max_length=1, description="Exactly one message.")
    max_tokens: int | None = Field(None, ge=1, description=f"The most new tokens; {NEW_TOKENS} by default.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens.")
    temperature: float | None = Field(
        None, ge=0, description="Greedy at 0, and without temperature and top_p."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Below 1 it samples, at temperature 1 by default."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed samples the same tokens."
    )
    stop: Stop | None = Field(None, description=f"Up to {STOPS} texts before which the answer ends.")
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    n: int | None = Field(None, description="Only 1.")
    top_logprobs: int | None = Field(None, description="Only 0.")
    response_format: dict[str, Any] | None = Field(None, description='Only {"type": "text"}.')
    frequency_penalty: float | None = Field(None, description="Only 0.")
    presence_penalty: float | None = Field(None, description="Only 0.")
    logit_bias: dict[str, float] | None = Field(None, description="Only {}.")
    tools: list[Any] | None = Field(None, description="Only [].")
    tool_choice: Any = Field(None, description="Only none or auto.")
    functions: list[Any] | None = Field(None, description="Only [].")
    function_call: Any = Field(None, description="Only none or auto.")
    modalities: list[str] | None = Field(None, description='Only ["text"].')
    audio: Any = Field(None, description="Only null.")
    prediction: Any = Field(None, description="Only null.")
    web_search_options: Any = Field(None, description="Only null.")
    reasoning_effort: str | None = Field(None, description="Only none.")
    verbosity: str | None = Field(None, description="Only null.")
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    user: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)
    metadata: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description="Has no effect: nothing is stored.")
    service_tier: str | None = Field(None, description=NO_EFFECT)

    @field_validator("messages", mode="before")
    @classmethod
    def one_message(cls, messages: Any) -> Any:
        if isinstance(messages, list) and len(messages) != 1:
            raise ValueError(f"PaliGemma holds no dialogue: send one message; here are {len(messages)}")
        return messages

    @field_validator("stop")
    @classmethod
    def few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > STOPS or not all(texts):
            raise ValueError(f"at most {STOPS} texts, none of them empty")
        return stop

    @field_validator(*NEUTRAL)
    @classmethod
    def neutral(cls, value: Any, info: ValidationInfo) -> Any:
        values, reason = NEUTRAL[info.field_name or ""]
        if value is not None and value not in values:
            raise ValueError(reason)
        return value
