"""Errors as OpenAI's clients read them."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nemo_mtbi.errors import DataError
from nemo_mtbi.serving.audio import TooLong
from nemo_mtbi.serving.batching import QueueFull


class RequestError(DataError):
    """Something wrong in one field of a request.

    Args:
        message: what.
        param: name of the field.
        status: of the answer.
    """

    def __init__(self, message: str, param: str, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status

    @classmethod
    def of(cls, error: DataError, param: str) -> "RequestError":
        """What is wrong with the data of a field: 413 for audio beyond the limit, else 400."""
        return cls(str(error), param, 413 if isinstance(error, TooLong) else 400)


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of what went wrong with an answer."""
    if isinstance(error, QueueFull):
        return 429, _body(str(error), "rate_limit_error")
    if isinstance(error, DataError):
        status, param = getattr(error, "status", 400), getattr(error, "param", None)
        return status, _body(str(error), "invalid_request_error", param)
    return 500, _body(f"The model failed: {type(error).__name__}.", "server_error")


def failure(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """A request that is refused."""
    return JSONResponse(_body(message, "invalid_request_error", param, code), status)


def _body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    error = {"message": message, "type": kind, "param": param, "code": code}
    # A message quotes the request, which may hold half a surrogate pair.
    written = {name: text and text.encode(errors="backslashreplace").decode() for name, text in error.items()}
    return {"error": written}


def explain_errors(app: FastAPI) -> None:
    """Whatever is raised while a request is answered becomes an error of OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        deepest = max(error.errors(), key=lambda e: len(e["loc"]))  # of the alternatives that content can be
        if deepest["type"] == "json_invalid":
            reason, place = deepest.get("ctx", {}).get("error", ""), deepest["loc"][-1]
            return failure(400, f"The body is no JSON: {reason} (character {place}).")
        names = [str(p) for p in deepest["loc"] if p != "body"]
        param = ".".join(names) or deepest.get("ctx", {}).get("name")
        return failure(400, f"{param or 'body'}: {deepest['msg']}", param)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail))

    @app.exception_handler(DataError)
    @app.exception_handler(QueueFull)
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        status, body = error_body(error)
        return JSONResponse(body, status, {"Retry-After": "1"} if status == 429 else None)
