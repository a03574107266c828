"""Slots for batches in flight, whose number changes while some are taken."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.consume.slots import Slots

pytestmark = pytest.mark.anyio


async def free(slots: Slots) -> int:
    """Count the slots that can be taken at once; they are given back."""
    taken = 0
    while not slots.locked():
        await slots.acquire()
        taken += 1
    for _ in range(taken):
        slots.release()
    return taken


async def test_more_slots_let_one_who_waits_begin() -> None:
    slots = Slots(1)
    await slots.acquire()
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    assert not waiting.done()
    slots.resize(2)
    await waiting


async def test_fewer_slots_count_once_those_in_use_are_free() -> None:
    slots = Slots(3)
    for _ in range(3):
        await slots.acquire()
    slots.resize(1)
    for expected in (0, 0, 1):
        slots.release()
        assert slots.locked() == (expected == 0)


@given(st.lists(st.integers(1, 6), max_size=8))
def test_number_is_the_last_one_when_all_have_been_used(numbers: list[int]) -> None:
    async def resize_and_count() -> int:
        slots = Slots(2)
        for number in numbers:
            await slots.acquire()
            slots.resize(number)
            slots.release()
        for _ in range(8):  # those too many are taken away as they are freed
            await free(slots)
        return await free(slots)

    assert asyncio.run(resize_and_count()) == (numbers or [2])[-1]
