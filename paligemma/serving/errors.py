"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from ..fields import shown
from .request import TAGS

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


class Refused(Exception):
    """A request that is not answered. The message names the value and the remedy."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The body of the response."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, other)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def busy(message: str, code: str) -> Refused:
    """A refusal that a later attempt may not meet."""
    return Refused(503, message, code, headers={"Retry-After": "1"})


def wrong_fields(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """The refusal for a body in which pydantic has found errors: the first of them."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", *TAGS)]
    param = ".".join(part if re.fullmatch(r"\w+", part) else shown(part) for part in place) or None
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it is cut off')}")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"{param} is not a field that this server knows: leave it out", "unknown", param)
    where = param or "the body"
    if first["type"] == "missing":
        return Refused(400, f"{where} is missing", "missing", param)
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "model_attributes_type"):
        problem = "it must be an object"
    return Refused(400, f"{where}: {problem}; it is {shown(first.get('input'))}", "invalid", param)
