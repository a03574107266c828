"""Bodies of requests within bounds of bytes and time."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.requests import Request

from schemas.errors import MessageError
from serving.api.bodies import Bodies
from serving.api.problems import RequestRefusedError

pytestmark = pytest.mark.anyio


def request(*chunks: bytes) -> Request:
    """Make a request whose body comes in chunks; where the last is empty it never ends."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if chunks[-1]:
        messages[-1]["more_body"] = False

    async def receive() -> Mapping[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)  # type: ignore[arg-type]  # starlette's mappings are mutable


async def test_body_that_does_not_come_to_its_end_is_given_up() -> None:
    bodies = Bodies(100, timeout_s=0.01)
    with pytest.raises(RequestRefusedError) as caught:
        await bodies.read(request(b"half", b"")).__aenter__()
    assert (caught.value.status, caught.value.reason) == (408, "too_slow")


async def test_time_that_the_body_is_used_is_not_counted() -> None:
    async with Bodies(100, timeout_s=0.01).read(request(b"all")) as data:
        await asyncio.sleep(0.03)
    assert data == b"all"


async def test_bodies_together_are_bounded_and_make_room_when_done_with() -> None:
    bodies = Bodies(100, max_bytes_at_once=250)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(bodies.read(request(bytes(60), bytes(40))))
        for _ in range(2):
            with pytest.raises(RequestRefusedError) as caught:
                await bodies.read(request(bytes(60), bytes(40))).__aenter__()
            assert caught.value.status == 503
            assert caught.value.headers == {"Retry-After": "1"}
        await stack.enter_async_context(bodies.read(request(bytes(50))))
    async with bodies.read(request(bytes(100))) as data:
        assert len(data) == 100


async def test_bodies_that_were_refused_or_broken_off_take_no_room() -> None:
    bodies = Bodies(100, max_bytes_at_once=100, timeout_s=0.01)
    for _ in range(5):
        with pytest.raises(MessageError):
            await bodies.read(request(bytes(60), bytes(60))).__aenter__()
        with pytest.raises(RequestRefusedError, match="longer"):
            await bodies.read(request(bytes(90), b"")).__aenter__()
    async with bodies.read(request(bytes(100))) as data:
        assert len(data) == 100
