"""What one request may ask for, and bodies that are cut off."""

from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_mtbi.serving.failures import failure


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 512
    max_audio_seconds: float = 3600.0
    max_body_bytes: int = 64 * 2**20
    max_text_characters: int = 20_000
    max_audios: int = 16
    max_answers: int = 8


class BodyLimit:
    """ASGI middleware: bodies over ``limit`` bytes are answered with 413 before they are kept."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.limit:
                raise HTTPException(413, f"The body is larger than {self.limit} bytes, which is the limit here.")
            return message

        if announced.isdigit() and int(announced) > self.limit:
            response = failure(413, f"The body has {int(announced)} bytes; {self.limit} is the limit here.")
            await response(scope, receive, send)
            return
        await self.app(scope, counted, send)
