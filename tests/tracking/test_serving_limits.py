"""Bodies that are too large get 413 before the server has them, and limits are read from the
environment.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tokendiff.errors import InputError
from tokendiff.tracking import serving_limits
from tokendiff.tracking.serving_limits import BodyLimit, Limits, max_body_bytes


def ask(pieces: Sequence[bytes], *, announced: int | None = None) -> tuple[int, bytes, int]:
    """Status and body of the answer of a server that echoes, and how many pieces were read."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body, has_more = b"", True
        while has_more:
            message = await receive()
            body, has_more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    num_read = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal num_read
        num_read += 1
        body, more = pieces[num_read - 1], num_read < len(pieces)
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if announced is None else [(b"content-length", str(announced).encode())]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/invocations",
        "query_string": b"",
        "headers": headers,
    }
    asyncio.run(BodyLimit(echo, max_bytes=10)(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body, num_read


def test_a_body_within_the_limit_arrives_whole() -> None:
    assert ask([b"12345", b"", b"67890"]) == (200, b"1234567890", 3)
    assert ask([b"1234567890"], announced=10) == (200, b"1234567890", 1)


def test_a_body_beyond_it_is_refused_before_it_is_read() -> None:
    status, body, num_read = ask([b"x" * 11], announced=11)
    assert (status, num_read) == (413, 0)
    assert b"may have 10 bytes" in body
    assert b"TOKENDIFF_SERVE_MAX_BODY_BYTES" in body


def test_pieces_are_counted_whatever_was_announced() -> None:
    for announced in (None, 3):
        status, _, num_read = ask([b"x" * 6] * 5, announced=announced)
        assert (status, num_read) == (413, 2)


def test_limits_come_from_the_environment() -> None:
    found = Limits.of_environment({"TOKENDIFF_SERVE_MAX_PROMPTS": "3", "MAX_TOKENS": "1"})
    assert found == Limits(max_prompts=3)
    assert max_body_bytes({"TOKENDIFF_SERVE_MAX_BODY_BYTES": "77"}) == 77


def test_a_limit_is_not_cut_to_a_smaller_one() -> None:
    name = "TOKENDIFF_SERVE_MAX_CHARS"
    assert Limits.of_environment({name: "9" * 18}).max_chars == 10**18 - 1
    with pytest.raises(InputError, match=f"{name}: '10+' has more than 18 digits; give a smaller"):
        Limits.of_environment({name: str(10**18)})


@pytest.mark.parametrize("text", ["0", "-1", "many", "1e3", "", "\u0663"])
def test_settings_that_are_no_numbers_are_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENDIFF_SERVE_MAX_TOKENS", text)
    with pytest.raises(InputError, match="TOKENDIFF_SERVE_MAX_TOKENS"):
        Limits.of_environment({"TOKENDIFF_SERVE_MAX_TOKENS": text})
    assert serving_limits.main(["models:/toy@champion"]) == 2
    assert "no whole number above 0" in capsys.readouterr().err
