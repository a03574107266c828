"""An API for each test."""

from collections.abc import AsyncIterator

import pytest
from helpers.api_bench import Bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.client:
        yield bench
