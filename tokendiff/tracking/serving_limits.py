"""How much one request to a served model may ask for, and what refuses more.

`served_model` holds requests against `Limits` before it samples: too much is answered with 413,
what can never be answered with 400. By then MLflow has read and parsed the body. `BodyLimit` stops
a body that is too large while it comes in; it is an ASGI layer around MLflow's own server:

    MLFLOW_TRACKING_URI=... python -m tokendiff.tracking.serving_limits models:/NAME@ALIAS

This module needs the standard library alone until the server starts.
"""

import argparse
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tokendiff.errors import InputError

_PREFIX = "TOKENDIFF_SERVE_"
_MAX_BODY_BYTES = 8 * 2**20
_MAX_DIGITS = 18

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request; each may be set in the environment, as TOKENDIFF_SERVE_MAX_PROMPTS.

    Attributes:
        max_prompts: prompts, each of which gives one row.
        max_chars: characters of all prompts together, known before any of them is tokenized.
        max_tokens: tokens of all rows together, prompts and answers.
        max_seconds: after which no further batch is begun; the client has had its 504 by then.
    """

    max_prompts: int = 256
    max_chars: int = 1_000_000
    max_tokens: int = 262_144
    max_seconds: int = 60

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Limits":
        """
        Raises:
            InputError: a variable is no whole number above 0, or one of more than 18 digits.
        """
        return cls(
            **{
                each.name: _whole_number(environment, each.name, int(each.default))  # type: ignore[arg-type]
                for each in fields(cls)
            }
        )

    def problem_of(self, prompts: Sequence[str], *, num_tokens: int | None = None) -> str | None:
        """Which limit the request exceeds, in words; None if it exceeds none.

        Args:
            num_tokens: of all rows, where it is known by now.
        """
        for name, count, what in (
            ("max_prompts", len(prompts), "prompts"),
            ("max_chars", sum(map(len, prompts)), "characters in its prompts"),
            ("max_tokens", num_tokens or 0, "tokens in its prompts and answers"),
        ):
            if count > (limit := getattr(self, name)):
                return (
                    f"a request may have {limit:,} {what}, this one has {count:,}; send several "
                    f"requests, or start the server with a larger {_PREFIX}{name.upper()}"
                )
        return None


class BodyLimit:
    """An ASGI application that stands before another one and answers larger bodies with 413.

    A body whose length is announced is refused before a byte of it is read, one that comes in
    pieces as soon as they are too many.
    """

    def __init__(self, app: App, *, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(send)
            return
        # Taken in here, so that the answer is 413 and not whatever the application makes of a body
        # that ends early.
        pieces: list[Message] = []
        num_bytes, has_more = 0, True
        while has_more:
            piece = await receive()
            num_bytes += len(piece.get("body", b""))
            if num_bytes > self._max_bytes:
                await self._refuse(send)
                return
            pieces.append(piece)
            has_more = piece["type"] == "http.request" and piece.get("more_body", False)
        kept = iter(pieces)

        async def replay() -> Message:
            return next(kept, None) or await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, send: Send) -> None:
        text = (
            f"a request's body may have {self._max_bytes:,} bytes; send several requests, or start "
            f"the server with a larger {_PREFIX}MAX_BODY_BYTES"
        ).encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": text})


def max_body_bytes(environment: Mapping[str, str]) -> int:
    return _whole_number(environment, "max_body_bytes", _MAX_BODY_BYTES)


def _whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    variable = f"{_PREFIX}{name.upper()}"
    text = environment.get(variable, str(default))
    is_number = text.isascii() and text.isdigit()
    if is_number and len(text) > _MAX_DIGITS:
        raise InputError(
            f"environment variable {variable}: {text!r:.40} has more than {_MAX_DIGITS} digits; "
            "give a smaller number"
        )
    if not (is_number and int(text) > 0):
        raise InputError(
            f"environment variable {variable}: {text!r:.40} is no whole number above 0"
        )
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tokendiff.tracking.serving_limits",
        description="Serve a registered model as `mlflow models serve` does, behind a limit on the "
        "size of bodies, in the environment that this command runs in.",
    )
    parser.add_argument("model", help="models:/NAME@ALIAS, or the folder of a model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    args = parser.parse_args(argv)
    try:
        max_bytes = max_body_bytes(os.environ)
        Limits.of_environment(os.environ)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import uvicorn
    from mlflow.pyfunc import scoring_server

    model = scoring_server.load_model_with_mlflow_config(args.model)
    app = BodyLimit(scoring_server.init(model), max_bytes=max_bytes)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
