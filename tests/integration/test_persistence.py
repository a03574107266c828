"""What the stream server does with confirmed images: evicts them, forgets them with its process, or takes no more."""

import json
import shlex
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from helpers.command_line import make_run
from helpers.fakes import make_result, png
from helpers.raw_redis import RawRedis, Reply
from helpers.redis_servers import Server, cluster, running
from helpers.streams import single_client
from redis.asyncio import Redis

from flawstream_cli.terminal import ExitCode
from schemas.errors import ConfigError, StreamUnavailableError
from schemas.keys import StreamKeys
from schemas.settings import RedisSettings, Settings
from serving.app import require_startable
from workers.acl import Role, access_rules
from workers.consume.reader import RedisStreamReader
from workers.consume.sink import RedisResultSink
from workers.ports import Completion
from workers.produce.producer import Producer
from workers.redis.connection import make_client
from workers.redis.embedded import free_port
from workers.redis.exhaustion import require_not_exhausted
from workers.redis.persistence import Persistence, all_warnings, require_no_eviction

pytestmark = pytest.mark.anyio

KEYS = StreamKeys()
LARGEST = "18446744073709551615-18446744073709551615"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server", "appendonly yes", "maxmemory 100mb")
    with running(server):
        yield server


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


def run_by_redis_cli(command: str, settings: RedisSettings) -> Reply:
    """Run a command as a shell splits it."""
    with RawRedis(int(settings.url.rsplit(":", 1)[1].partition("/")[0])) as raw:
        return raw(*shlex.split(command))


async def persistence(settings: RedisSettings) -> list[Persistence]:
    async with make_client(settings) as client:
        return await require_no_eviction(client)


async def test_a_server_that_keeps_what_it_confirmed_has_no_warnings(server: Server) -> None:
    (found,) = await persistence(RedisSettings(url=server.url))
    assert found.describe() == "maxmemory-policy noeviction, appendonly yes, appendfsync everysec"
    assert found.warnings() == []


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_a_server_that_evicts_streams_is_refused_with_the_command_that_mends_it(
    server: Server, policy: str
) -> None:
    server("CONFIG", "SET", "maxmemory-policy", policy)
    with pytest.raises(ConfigError, match=f"{policy}.*CONFIG SET maxmemory-policy noeviction"):
        await persistence(RedisSettings(url=server.url))
    server("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await persistence(RedisSettings(url=server.url))


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("maxmemory-policy", "volatile-lru", "repeated pushes"),
        ("appendonly", "no", "no append-only file"),
        ("appendfsync", "no", "power cut"),
    ],
)
async def test_what_a_server_may_lose_is_a_warning(server: Server, name: str, value: str, warning: str) -> None:
    server("CONFIG", "SET", name, value)
    (found,) = all_warnings(await persistence(RedisSettings(url=server.url)))
    assert warning in found
    assert f"redis-cli CONFIG SET {name} " in found


async def test_a_policy_that_evicts_nothing_without_a_bound_is_a_warning(server: Server) -> None:
    server("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    server("CONFIG", "SET", "maxmemory", 0)
    assert len(all_warnings(await persistence(RedisSettings(url=server.url)))) == 1


async def test_a_user_who_may_not_ask_is_not_refused(server: Server) -> None:
    server("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    server("ACL", "SETUSER", "w", "reset", "on", ">right", *access_rules(Role.WORKER, "flawstream").split())
    (found,) = await persistence(RedisSettings(url=server.url, username="w", password="right"))  # noqa: S106
    assert found.describe() == "maxmemory-policy unknown, appendonly unknown, appendfsync unknown"


@pytest.mark.parametrize("rename", [True, False])
async def test_a_managed_server_without_config_is_judged_by_its_info(tmp_path: Path, *, rename: bool) -> None:
    gone = ["rename-command CONFIG ''"] if rename else []
    server = Server(
        tmp_path, "maxmemory-policy allkeys-lru", "maxmemory 100mb", "user m on >right ~* +@all -config", *gone
    )
    settings = RedisSettings(url=server.url, username="m", password="right")  # noqa: S106
    with running(server), pytest.raises(ConfigError, match="allkeys-lru"):
        await persistence(settings)


async def test_every_primary_of_a_cluster_is_asked(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        settings = RedisSettings(url=nodes[0].url, cluster=True, shards=2)
        assert len(await persistence(settings)) == 3
        nodes[2]("CONFIG", "SET", "maxmemory", "100mb")
        nodes[2]("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        with pytest.raises(ConfigError, match=str(nodes[2].port)):
            await persistence(settings)


def test_service_and_doctor_refuse_a_server_that_evicts_streams(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    settings = Settings.model_validate(
        {"redis": {"url": server.url}, "api": {"port": free_port()}, "registry": {"root": str(tmp_path)}}
    )
    with pytest.raises(ConfigError, match="allkeys-lru"):
        require_startable(settings)
    run = make_run(monkeypatch, capsys)
    ran = run("doctor", "--redis", server.url, "--registry", tmp_path, "--json")
    streams = json.loads(ran.out)["streams"]
    assert (ran.code, streams["ok"]) == (ExitCode.FAILED, False)
    assert "CONFIG SET maxmemory-policy noeviction" in streams["detail"]


async def test_an_exhausted_stream_is_named_and_mended_by_the_command_in_the_text(
    client: Redis, redis_settings: RedisSettings
) -> None:
    await client.xadd(KEYS.images, {"category": "bottle", "image": png()}, id=LARGEST)
    async with Producer(redis_settings) as producer:
        with pytest.raises(StreamUnavailableError, match="largest id; nothing was written; `flawstream doctor`"):
            await producer.push(png(), "bottle", id="part-7")
        with pytest.raises(ConfigError, match="takes no more images") as caught:
            await require_not_exhausted(client, [KEYS])
        command = str(caught.value).partition("redis-cli ")[2]
        assert run_by_redis_cli(command, redis_settings) == b"not empty yet"
        reader = RedisStreamReader(client, KEYS, "w", redis_settings, claim_idle_ms=60_000)
        (entry,) = await reader.read(8, 1 << 30)
        assert await RedisResultSink(client, KEYS, "w").publish([Completion(entry.entry_id, make_result("x"))]) == [
            True
        ]
        with pytest.raises(ConfigError, match="takes no more images"):
            await require_not_exhausted(client, [KEYS])
        run_by_redis_cli(command, redis_settings)
        await require_not_exhausted(client, [KEYS])
        entry_id = await producer.push(png(), "bottle", id="part-7")
        assert [entry.entry_id for entry in await reader.read(8, 1 << 30)] == [entry_id]


def test_doctor_names_an_exhausted_stream(
    redis_settings: RedisSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_by_redis_cli(f"XADD {KEYS.dead} {LARGEST} a b", redis_settings)
    ran = make_run(monkeypatch, capsys)("doctor", "--redis", redis_settings.url, "--registry", tmp_path, "--json")
    assert ran.code == ExitCode.FAILED
    assert f"redis-cli RENAME {KEYS.dead} {KEYS.dead}:full" in json.loads(ran.out)["streams"]["detail"]


async def test_exhausted_results_keep_images_pending_until_they_are_renamed(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with Producer(redis_settings) as producer:
        await producer.push(png(), "bottle", id="part-7")
    await client.xadd(KEYS.results, {"a": "b"}, id=LARGEST)
    reader = RedisStreamReader(client, KEYS, "w", redis_settings, claim_idle_ms=60_000)
    (entry,) = await reader.read(8, 1 << 30)
    sink, completion = RedisResultSink(client, KEYS, "w"), Completion(entry.entry_id, make_result("part-7"))
    with pytest.raises(StreamUnavailableError, match="largest id"):
        await sink.publish([completion])
    with pytest.raises(ConfigError, match=f"RENAME {KEYS.results}") as caught:
        await require_not_exhausted(client, [KEYS])
    run_by_redis_cli(str(caught.value).partition("redis-cli ")[2], redis_settings)
    assert await sink.publish([completion]) == [True]
    assert await client.xlen(KEYS.results) == 1
