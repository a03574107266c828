"""No client sends a command again by itself: it may have been executed, and a second XADD writes twice."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.redis_servers import Server, cluster, replicated, running

from schemas.errors import StreamUnavailableError
from schemas.settings import RedisSettings
from workers.redis.connection import make_client
from workers.redis.errors import stream_errors

pytestmark = pytest.mark.anyio

STREAM = "flawstream:{0}:images"
WRITE_AND_SAY_MUCH = "redis.call('XADD', KEYS[1], '*', 'a', 'b') return string.rep('x', 1000000)"


@pytest.fixture(params=["single", "sentinel", "cluster"])
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RedisSettings, list[Server]]]:
    """Give each kind of server, and how to reach it."""
    with ExitStack() as stack:
        match request.param:
            case "single":
                servers = [Server(tmp_path)]
                stack.enter_context(running(*servers))
                more: dict[str, object] = {"url": servers[0].url}
            case "sentinel":
                plant = stack.enter_context(replicated(tmp_path, replicas=1))
                servers = plant.servers
                more = {"sentinels": plant.addresses, "sentinel_primary": plant.name}
            case _:
                servers = stack.enter_context(cluster(tmp_path))
                more = {"url": servers[0].url, "cluster": True, "shards": 2}
        yield RedisSettings().model_copy(update=more), servers


async def test_a_command_whose_answer_is_cut_off_is_executed_once(
    setting: tuple[RedisSettings, list[Server]],
) -> None:
    settings, servers = setting
    for server in servers:  # hangs up on whom it would have to say more
        server("CONFIG", "SET", "client-output-buffer-limit", "normal 100000 0 0")
    async with make_client(settings) as client:
        assert await client.xlen(STREAM) == 0
        with pytest.raises(StreamUnavailableError), stream_errors(client):
            await client.eval(WRITE_AND_SAY_MUCH, 1, STREAM)
        assert await client.xlen(STREAM) == 1
