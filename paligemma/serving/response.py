"""The bodies of responses: OpenAI's chat completions, with the objects that the answer locates."""

from typing import Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "paligemma"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "shutting down", "failed"]
    error: str | None = None


class Token(BaseModel):
    token: str = Field(
        description="The text that the token adds; empty within a character of several tokens."
    )
    logprob: float = Field(description="Natural, under the model itself, before temperature and top_p.")
    bytes: list[int] = Field(description="The text in UTF-8.")
    top_logprobs: list = []


class LogProbs(BaseModel):
    content: list[Token]


class Object(BaseModel):
    """A located object, with the names of docs/json.md."""

    label: str
    box: tuple[int, int, int, int] = Field(description="x0, y0, x1, y1 in pixels of the first picture.")
    score: float | None
    box_score: float | None
    label_score: float | None
    mask: str | None = Field(
        description="A PNG of the picture's size as a data URL, 255 where the object is."
    )


class Fault(BaseModel):
    """A part of the answer that is not an object."""

    text: str
    fault: str


class Size(BaseModel):
    """Of the first picture, upright, in pixels."""

    width: int
    height: int


class Timings(BaseModel):
    """From the arrival of the whole request."""

    first_token_s: float
    total_s: float
    new_tokens: int
    tokens_per_s: float | None = Field(description="After the first token; null for an answer of one token.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="With those of the pictures.")
    completion_tokens: int = Field(description="With the end token.")
    total_tokens: int


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: LogProbs | None = None
    finish_reason: FinishReason
    objects: list[Object]
    faults: list[Fault]


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    image_size: Size
    timings: Timings


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: LogProbs | None = None
    finish_reason: FinishReason | None = None
    objects: list[Object] | None = Field(None, description="In the chunk with the finish_reason only.")
    faults: list[Fault] | None = Field(None, description="As objects.")


class Chunk(BaseModel):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(None, description="In the last chunk, if stream_options ask for it.")
    image_size: Size | None = Field(None, description="In the chunk with the finish_reason only.")
    timings: Timings | None = Field(None, description="As image_size.")
