"""The queue between a camera and the stream, and the choice of frames."""

import asyncio
from datetime import UTC, datetime

import numpy as np
import pytest

from schemas.errors import MessageError
from workers.capture import camera
from workers.capture.camera import Camera, Frame, FrameQueue, Selection
from workers.capture.frames import Encoding

pytestmark = pytest.mark.anyio


def frame(number: int, side_px: int = 2) -> Frame:
    return Frame(np.zeros((side_px, side_px, 3), np.uint8), datetime(2026, 1, 1, tzinfo=UTC), number)


async def numbers(queue: FrameQueue) -> list[int]:
    queue.close()
    found = []
    while (one := await queue.get()) is not None:
        found.append(one.number)
    return found


async def test_a_full_queue_drops_the_oldest_frame_and_counts_it() -> None:
    queue = FrameQueue(3)
    for number in range(5):
        queue.put(frame(number))
    assert queue.dropped == 2
    assert await numbers(queue) == [2, 3, 4]


async def test_a_queue_is_bounded_in_bytes_and_takes_one_frame_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera, "_QUEUE_BYTES", 100)
    queue = FrameQueue(10)
    queue.put(frame(0))
    queue.put(frame(1, side_px=100))
    assert queue.dropped == 1
    queue.put(frame(2))
    assert queue.dropped == 2
    assert await numbers(queue) == [2]


async def test_get_waits_for_a_frame_of_another_thread_and_ends_when_the_queue_is_closed() -> None:
    queue = FrameQueue(3)
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    await asyncio.to_thread(queue.put, frame(7))
    got = await waiting
    assert got is not None
    assert got.number == 7
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    await asyncio.to_thread(queue.close)
    assert await waiting is None


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        (Selection(), list(range(20))),
        (Selection(every=6), [0, 6, 12, 18]),
        (Selection(fps=2.0), [0, 5, 10, 15]),
        (Selection(fps=4.0), [0, 3, 5, 8, 10, 13, 15, 18]),
        (Selection(fps=100.0), list(range(20))),
    ],
)
def test_frames_of_a_camera_with_ten_a_second_that_are_kept(selection: Selection, kept: list[int]) -> None:
    reader = Camera(0, selection, lambda _text: None)
    found = []
    for number in range(20):
        reader.frames = number + 1
        if reader._is_kept(number / 10):  # noqa: SLF001 - the camera itself has no clock to set
            found.append(number)
    assert found == kept


async def test_a_frame_that_no_jpeg_can_hold_is_an_error_of_the_frame() -> None:
    long = Frame(np.zeros((70_000, 1, 3), np.uint8), datetime(2026, 1, 1, tzinfo=UTC), 0)
    with pytest.raises(MessageError, match=r"cannot be encoded as \.jpg"):
        Encoding().encode(long)
    assert Encoding(png=True).encode(long).startswith(b"\x89PNG")
