"""What integration tests share: one Ray cluster on this machine, and one server with users."""

from collections.abc import AsyncIterator, Iterator
from hashlib import sha256

import pytest
from helpers.acl_plant import PASSWORD, Plant, run_command
from helpers.redis_servers import Server, running
from helpers.streams import single_client

from flawstream_cli import cluster as ray_cluster
from schemas.settings import RedisSettings
from workers.acl import Role, access_rules, user_line


@pytest.fixture(scope="session")
def cluster() -> Iterator[ray_cluster.Cluster]:
    """Start a Ray cluster for all tests that ask for it."""
    yield ray_cluster.connect()
    ray_cluster.disconnect()


@pytest.fixture(scope="session")
def acl_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server of its own: it keeps users, and an AOF to wait for."""
    server = Server(tmp_path_factory.mktemp("valkey-acl"), 'save ""', "appendonly yes", "appendfsync always")
    with running(server):
        yield server


@pytest.fixture(params=[0, 12], ids=["one set of streams", "shards"])
async def plant(acl_server: Server, request: pytest.FixtureRequest) -> AsyncIterator[Plant]:
    """Give an empty server with its users and one set of streams, or several."""
    base = RedisSettings(url=acl_server.url, prefix="plant[7]", shards=request.param, block_ms=20)
    async with single_client(base) as admin:
        await admin.config_set("maxmemory", 0)
        await admin.flushall()
        for role in Role:
            rules = access_rules(role, base.prefix, base.shards, ["frames:"])
            line = user_line(f"plant-{role}", rules, sha256(PASSWORD.encode()).hexdigest())
            await run_command(admin, *line.split())
        yield Plant(admin, base)
