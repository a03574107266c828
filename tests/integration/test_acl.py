"""Users with the rights of `flawstream acl` on a real server: each does its job to the end, and nothing else."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import make_run
from helpers.fakes import FakeDetector, png
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server, cluster
from helpers.redis_servers import running as running_server
from helpers.waiting import wait_until_async
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from flawstream_cli.terminal import ExitCode
from schemas.errors import BacklogFullError, ConfigError, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys
from schemas.settings import BacklogSettings, RedisSettings, Settings, WorkerSettings
from workers.acl import HASH_PLACEHOLDER, Role, access_rules, user_line
from workers.consume import reader as reader_module
from workers.consume.sharded import ShardedWorker
from workers.observe.backlog import Backlog
from workers.outcomes.dead_letters import DeadLetterBox
from workers.outcomes.results import DeadLetterReader, ResultReader
from workers.produce.producer import Producer
from workers.redis import scripts as scripts_module
from workers.redis.embedded import EmbeddedServer
from workers.redis.scripts import make_client

pytestmark = pytest.mark.anyio

PASSWORD = "correct horse battery staple"  # noqa: S105 - of a server that lives for this test
SCRIPTS = Path(scripts_module.__file__).parent / "lua"
WHO_RUNS = {
    "ask.lua": (Role.PRODUCER, Role.SERVICE),
    "backlog.lua": (Role.WORKER, Role.SERVICE),
    "claim.lua": (Role.WORKER, Role.SERVICE),
    "count.lua": (Role.PRODUCER, Role.SERVICE, Role.OPERATOR),
    "forget.lua": (Role.WORKER, Role.SERVICE),
    "letters.lua": (Role.OPERATOR,),
    "owned.lua": (Role.WORKER, Role.SERVICE),
    "publish.lua": (Role.WORKER, Role.SERVICE),
    "push.lua": (Role.PRODUCER, Role.SERVICE),
    "read.lua": (Role.WORKER, Role.SERVICE),
    "release.lua": (Role.WORKER, Role.SERVICE),
    "replay.lua": (Role.OPERATOR,),
    "retention.lua": (Role.WORKER, Role.SERVICE),
    "room.lua": (Role.PRODUCER, Role.SERVICE, Role.OPERATOR),
    "touch.lua": (Role.WORKER, Role.SERVICE),
}
"""Whoever adds a script says here who runs it."""
TOLD = {"letters.lua": {"command": ("XRANGE", "XREVRANGE")}}
"""Commands that a script is told by its caller, by the name of the variable."""


@dataclass
class Plant:
    """A server with one user for each role, and the streams as its administrator sees them."""

    admin: Redis
    base: RedisSettings

    @property
    def keys(self) -> StreamKeys:
        return all_keys(self.base)[-1]  # the last: its number has the most digits

    def as_(self, role: Role) -> RedisSettings:
        return self.base.model_validate(self.base.model_dump() | {"username": f"plant-{role}", "password": PASSWORD})

    @asynccontextmanager
    async def client(self, role: Role) -> AsyncIterator[Redis]:
        async with make_client(self.as_(role)) as client:
            yield client

    async def is_clean(self) -> bool:
        """Tell whether all images have ended and the one worker is the one consumer."""
        consumers = await self.admin.xinfo_consumers(self.keys.images, self.keys.group)
        return not await self.admin.xlen(self.keys.images) and [one["name"] for one in consumers] == [b"w"]

    @asynccontextmanager
    async def worker(self, role: Role = Role.WORKER, **settings: Any) -> AsyncIterator[ShardedWorker]:
        """Have a worker run as a user; it must do so without an unexpected failure."""
        async with self.client(role) as client:
            worker = ShardedWorker(client, "w", FakeDetector(), Settings(redis=self.as_(role), **settings))
            stop = asyncio.Event()
            running = asyncio.create_task(worker.run(stop))
            yield worker
            stop.set()
            await running
            await worker.close()
            assert worker.stats.errors == 0

    async def add_image(self, image: bytes | None = None, message_id: str = "part-1") -> str:
        fields = {"id": message_id, "category": "bottle", "image": png() if image is None else image}
        return str((await self.admin.xadd(self.keys.images, fields)).decode())  # type: ignore[arg-type]  # text and bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Start a server of its own: it keeps users, and an AOF to wait for."""
    with EmbeddedServer(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(params=[0, 12], ids=["one set of streams", "shards"])
async def plant(server: EmbeddedServer, request: pytest.FixtureRequest) -> AsyncIterator[Plant]:
    base = RedisSettings(url=server.url, prefix="plant[7]", shards=request.param, block_ms=20)
    async with make_client(base) as admin:
        await admin.config_set("maxmemory", 0)
        await admin.flushall()
        for role in Role:
            rules = access_rules(role, base.prefix, base.shards, ["frames:"])
            line = user_line(f"plant-{role}", rules, sha256(PASSWORD.encode()).hexdigest())
            await admin.execute_command(*line.split())
        yield Plant(admin, base)


def granted(role: Role) -> set[str]:
    return set(re.findall(r"\+([a-z|]+)", access_rules(role, "flawstream", 12)))


def called(script: str) -> set[str]:
    text = (SCRIPTS / script).read_text(encoding="utf-8")
    for name, commands in TOLD.get(script, {}).items():
        text = text.replace(f"redis.call({name},", " ".join(f"redis.call('{command}'," for command in commands))
    containers = {"XINFO", "XGROUP", "MEMORY", "OBJECT", "CONFIG", "SCRIPT", "CLIENT", "FUNCTION"}
    calls = re.findall(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?", text)
    assert len(calls) == len(re.findall(r"redis\.p?call\b", text)), "a call whose command this test cannot read"
    return {f"{name}|{sub}".lower() if name in containers else name.lower() for name, sub in calls}


def test_who_runs_each_script_is_known_here() -> None:
    assert set(WHO_RUNS) == {path.name for path in SCRIPTS.rglob("*.lua")}


@pytest.mark.parametrize("script", WHO_RUNS)
def test_script_calls_nothing_that_its_callers_may_not(script: str) -> None:
    for role in WHO_RUNS[script]:
        assert called(script) <= granted(role)


async def test_producer_pushes_is_recognised_and_is_refused_where_there_is_no_room(plant: Plant) -> None:
    settings = plant.as_(Role.PRODUCER).model_copy(update={"wait_local_fsync": True})
    async with Producer(settings, backlog=BacklogSettings(max_images=3)) as producer:
        first = await producer.push(png(), "bottle", id="part-1")
        assert await producer.push(png(), "bottle", id="part-1") == first
        for _ in range(3 * len(all_keys(plant.base)) - 1):
            with contextlib.suppress(BacklogFullError):  # the shard that has the first is full before the others
                await producer.push(png(), "bottle")
        with pytest.raises(BacklogFullError):
            await producer.push(png(), "bottle", id="part-2")
    counted = [await plant.admin.hgetall(keys.counters) for keys in all_keys(plant.base)]
    assert sum(int(one.get(b"duplicates", 0)) for one in counted) == 1
    assert sum(int(one.get(b"refused_images", 0)) for one in counted) >= 1


async def test_producer_is_told_that_no_replica_has_it(plant: Plant) -> None:
    settings = plant.as_(Role.PRODUCER).model_copy(update={"wait_replicas": 1, "timeout_s": 3.0})
    async with Producer(settings) as producer:
        with pytest.raises(StreamUnavailableError, match="0 of 1 replicas have it"):
            await producer.push(png(), "bottle")


async def test_producer_measures_a_long_stream_and_is_refused_at_the_server_s_memory_limit(plant: Plant) -> None:
    plant.base = plant.base.model_copy(update={"shards": min(plant.base.shards, 1)})
    async with plant.admin.pipeline(transaction=False) as pipe:
        for _ in range(1100):
            pipe.xadd(plant.keys.images, {"image": b"x"})
        await pipe.execute()
    async with Producer(plant.as_(Role.PRODUCER)) as producer:
        await producer.push(png(), "bottle")
        await plant.admin.config_set("maxmemory", 1)
        with pytest.raises(BacklogFullError, match="out of memory"):
            await producer.push(png(), "bottle")
    assert await plant.admin.hget(plant.keys.counters, "refused_memory") == b"1"


async def test_plain_producer_needs_no_more_than_xadd(plant: Plant) -> None:
    async with plant.client(Role.PRODUCER) as client:
        await client.xadd(plant.keys.images, {"category": b"bottle", "image": png()})
    assert await plant.admin.xlen(plant.keys.images) == 1


@pytest.mark.parametrize("role", [Role.WORKER, Role.SERVICE])
async def test_worker_makes_its_group_ends_images_claims_what_others_left_and_cleans_up(
    plant: Plant, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_DEAD_AFTER_MS", 0)
    keys = plant.keys
    await plant.admin.xgroup_create(keys.results, "line", id="0", mkstream=True)
    for number in range(300):
        await plant.admin.xadd(keys.results, {"id": f"old-{number}"})
    await plant.admin.xreadgroup("line", "one", {keys.results: ">"})
    await plant.admin.xack(keys.results, "line", *[row[0] for row in await plant.admin.xrange(keys.results)])
    await plant.admin.xgroup_create(keys.images, keys.group, id="0", mkstream=True)
    left_behind = await plant.add_image()
    await plant.admin.xreadgroup(keys.group, "gone", {keys.images: ">"})
    mine = await plant.add_image()
    await plant.admin.xreadgroup(keys.group, "w", {keys.images: ">"})
    good, bad = await plant.add_image(message_id="good"), await plant.add_image(b"no image", message_id="bad")
    backlog, loop = BacklogSettings(keep_results=1), WorkerSettings(claim_idle_ms=100, sweep_s=0.05)
    async with plant.worker(role, backlog=backlog, worker=loop) as worker:
        await until(plant.is_clean, worker)
    async with plant.client(role) as client:
        state = await Backlog(client, all_keys(plant.base)).read()
    assert (worker.stats.results, sum(worker.stats.dead.values())) == (3, 1)
    assert {left_behind, mine, good, bad}
    assert (state.images, state.dead) == (0, 1)
    assert state.results < 303


async def test_worker_makes_the_group_on_an_empty_server(plant: Plant) -> None:
    async with plant.worker() as worker:
        await until(lambda: plant.admin.exists(plant.keys.images), worker)


async def test_worker_and_service_fetch_images_by_reference_and_no_other_keys(plant: Plant) -> None:
    await plant.admin.set("frames:1", b"bytes")
    await plant.admin.set("other", b"bytes")
    for role in (Role.WORKER, Role.SERVICE):
        async with plant.client(role) as client:
            assert await client.strlen("frames:1") == 5
            assert await client.get("frames:1") == b"bytes"
            for command in (("GET", "other"), ("SET", "frames:1", "x"), ("DEL", "frames:1")):
                await expect_refusal(client, *command)


async def test_reader_makes_its_group_reads_and_acknowledges(plant: Plant) -> None:
    await plant.add_image()
    async with plant.worker() as worker:
        await until(lambda: plant.admin.exists(plant.keys.results), worker)
    settings = plant.as_(Role.READER)
    async with ResultReader(settings, "line") as results:
        async for entry_id, result in results:
            assert result.category == "bottle"
            await results.ack(entry_id)
            break
    assert (await plant.admin.xpending(plant.keys.results, "line"))["pending"] == 0
    async with ResultReader(settings) as alone:
        assert await alone.read() == []


async def test_plain_reader_takes_over_what_another_of_its_group_left_and_looks_around(plant: Plant) -> None:
    results = plant.keys.results
    await plant.admin.xadd(results, {"id": "x"})
    async with plant.client(Role.READER) as client:
        await client.xgroup_create(results, "line", id="0")
        await client.xreadgroup("line", "gone", {results: ">"})
        assert (await client.xpending(results, "line"))["pending"] == 1
        claimed = await client.xautoclaim(results, "line", "one", min_idle_time=0)
        assert [fields for _, fields in claimed[1]] == [{b"id": b"x"}]
        assert await client.xlen(results) == len(await client.xrange(results)) == 1


async def test_operator_looks_through_dead_letters_sends_them_again_and_throws_them_away(plant: Plant) -> None:
    letter = {
        "id": "x",
        "image": b"no image",
        "dead.reason": "undecodable",
        "dead.detail": "no image",
        "dead.deliveries": "1",
        "dead.failed_at": "2026-01-01T00:00:00+00:00",
        "dead.entry_id": "1-1",
    }
    for _ in range(4):
        await plant.admin.xadd(plant.keys.dead, letter)  # type: ignore[arg-type]  # text and bytes
    async with plant.client(Role.OPERATOR) as client:
        box = DeadLetterBox(client, plant.as_(Role.OPERATOR))
        assert await box.count() == 4
        first, second, *_ = [entry.dead_id for entry in await box.newest()]
        assert await box.get(first) is not None
        assert await box.replay(first) is not None
        full = DeadLetterBox(client, plant.as_(Role.OPERATOR), BacklogSettings(max_images=1))
        with pytest.raises(BacklogFullError):
            await full.replay(second)
        assert await box.purge([second]) == 1
        assert sum([gone async for gone in box.purge_until()]) == 2
    assert await plant.admin.exists(plant.keys.seen("x")) == 1
    async with DeadLetterReader(plant.as_(Role.OPERATOR)) as letters:
        assert await letters.read() == []
        await plant.admin.xadd(plant.keys.dead, letter)  # type: ignore[arg-type]  # the same
        async for _, found in letters:
            assert found.reason == "undecodable"
            break


FORBIDDEN: dict[Role, tuple[str, ...]] = {
    Role.PRODUCER: (
        "XRANGE {images} - +",
        "XREAD STREAMS {images} 0",
        "XREADGROUP GROUP workers x STREAMS {images} >",
        "XDEL {images} 1-1",
        "XTRIM {images} MAXLEN 0",
        "SET {images} x",
        "DEL {images}",
        "SET {counters} x",
        "GET {results}",
        "XRANGE {results} - +",
        "XADD {results} * a b",
        "XRANGE {dead} - +",
        "HGETALL {counters}",
        "EVAL return(redis.call('XRANGE',KEYS[1],'-','+')) 1 {images}",
        "EVAL return(redis.call('DEL',KEYS[1])) 1 {images}",
    ),
    Role.WORKER: (
        "XADD {images} * a b",
        "XTRIM {images} MAXLEN 0",
        "DEL {images}",
        "XRANGE {dead} - +",
        "XDEL {dead} 1-1",
        "XRANGE {results} - +",
        "XGROUP DESTROY {images} workers",
        "SET {seen} x",
        "GET {seen}",
        "EVAL return(redis.call('XDEL',KEYS[1],'1-1')) 1 {results}",
    ),
    Role.READER: (
        "XADD {results} * a b",
        "XDEL {results} 1-1",
        "XTRIM {results} MAXLEN 0",
        "XGROUP DESTROY {results} line",
        "DEL {results}",
        "XRANGE {images} - +",
        "XREAD STREAMS {images} 0",
        "XREADGROUP GROUP workers x STREAMS {images} >",
        "XRANGE {dead} - +",
        "HGETALL {counters}",
        "EVAL return(redis.call('XADD',KEYS[1],'*','a','b')) 1 {results}",
        "EVAL return(redis.call('XRANGE',KEYS[1],'-','+')) 1 {images}",
    ),
    Role.OPERATOR: (
        "XRANGE {images} - +",
        "XDEL {images} 1-1",
        "XRANGE {results} - +",
        "DEL {dead}",
        "XADD {dead} * a b",
        "SET {images} x",
    ),
    Role.SERVICE: ("DEL {images}", "XTRIM {images} MAXLEN 0", "SET {images} x", "XRANGE {dead} - +"),
}
FORBIDDEN_TO_ALL = (
    "FLUSHALL",
    "CONFIG GET *",
    "KEYS *",
    "SCAN 0",
    "ACL LIST",
    "INFO",
    "MONITOR",
    "SCRIPT FLUSH",
    "SCRIPT KILL",
    "FUNCTION LIST",
    "SUBSCRIBE x",
    "PUBLISH x y",
    "SHUTDOWN",
    "CLIENT LIST",
    "GET another",
    "XADD other:images * a b",
    "XADD plant7:images * a b",
)


@pytest.mark.parametrize("role", Role)
async def test_user_is_refused_everything_else(plant: Plant, role: Role) -> None:
    names = {
        "images": plant.keys.images,
        "results": plant.keys.results,
        "dead": plant.keys.dead,
        "counters": plant.keys.counters,
        "seen": plant.keys.seen("x"),
    }
    async with plant.client(role) as client:
        for command in (*FORBIDDEN[role], *FORBIDDEN_TO_ALL):
            await expect_refusal(client, *(part.format(**names) for part in command.split()))


async def test_user_of_another_prefix_is_refused_ours(plant: Plant) -> None:
    rules = access_rules(Role.SERVICE, "plant7", plant.base.shards)
    line = user_line("stranger", rules, sha256(PASSWORD.encode()).hexdigest())
    await plant.admin.execute_command(*line.split())
    theirs = plant.as_(Role.SERVICE).model_copy(update={"username": "stranger"})
    async with make_client(theirs) as client:
        await expect_refusal(client, "XADD", plant.keys.images, "*", "a", "b")


async def until(happened: Callable[[], Awaitable[object]], worker: ShardedWorker) -> None:
    """Wait for the worker to do something; a failure that it cannot foresee ends the wait."""

    async def without_errors() -> object:
        assert worker.stats.errors == 0
        return await happened()

    await wait_until_async(without_errors, "what the worker is to do")


async def expect_refusal(client: Redis, *command: str) -> None:
    with pytest.raises(ResponseError) as caught:
        await client.execute_command(*command)
    told = f"{type(caught.value).__name__} {caught.value}"
    assert "NoPermission" in told or "NOPERM" in told or "ACL failure" in told, f"{command}: {told}"


def test_command_prints_users_who_can_push_and_look_at_dead_letters(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = make_run(monkeypatch, capsys)
    (tmp_path / "password").write_text(f"{PASSWORD}\n", encoding="utf-8")
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setenv("FLAWSTREAM_REDIS__PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("FLAWSTREAM_REDIS__URL", server.url)
    for role in (Role.PRODUCER, Role.OPERATOR):
        printed = run("acl", role, "--password-file", tmp_path / "password")
        assert PASSWORD not in printed.out + printed.err
        with RawRedis(server.port) as raw:
            raw(*printed.out.split())
    monkeypatch.setenv("FLAWSTREAM_REDIS__USERNAME", "flawstream-producer")
    assert run("push", tmp_path / "a.png", "-c", "bottle").code == 0
    assert run("dead", "list").code == ExitCode.CANNOT_START
    monkeypatch.setenv("FLAWSTREAM_REDIS__USERNAME", "flawstream-operator")
    assert run("dead", "list").code == 0


def test_command_prints_one_line_however_long_and_says_what_is_to_be_filled_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(monkeypatch, capsys)
    as_file = run("acl", "service", "--shards", 1024, "--user", "node-1", "--format", "aclfile")
    (line,) = as_file.out.splitlines()
    assert line.startswith(f"user node-1 on #{HASH_PLACEHOLDER} ")
    assert HASH_PLACEHOLDER in as_file.err
    monkeypatch.setenv("FLAWSTREAM_REFERENCES__ALLOW", '["key:frames:"]')
    assert "(%R~frames:* +get +strlen)" in run("acl", "worker").out
    assert "frames" not in run("acl", "producer").out


async def test_users_of_a_cluster_do_their_jobs_on_all_its_servers(tmp_path: Path) -> None:
    base = {"cluster": True, "shards": 6, "block_ms": 100, "password": PASSWORD}
    digest = sha256(PASSWORD.encode()).hexdigest()
    with cluster(tmp_path) as nodes:
        for node, role in itertools.product(nodes, Role):
            node(*user_line(role, access_rules(role, "flawstream", 6), digest).split())
        users = {role: RedisSettings.model_validate({**base, "url": nodes[0].url, "username": role}) for role in Role}
        durable = users[Role.PRODUCER].model_copy(update={"wait_local_fsync": True})
        async with Producer(durable) as producer:
            for number in range(30):
                await producer.push(png() if number else b"no image", "bottle", id=f"part-{number}")
        service = Settings(redis=users[Role.SERVICE])
        async with make_client(service.redis) as client:
            worker = ShardedWorker(client, "w", FakeDetector(), service)
            backlog = Backlog(client, all_keys(service.redis), max_age_s=0.05)
            stop = asyncio.Event()
            running = asyncio.create_task(worker.run(stop))

            async def all_have_ended() -> bool:
                state = await backlog.read()
                return (state.images, state.results, state.dead) == (0, 29, 1)

            await until(all_have_ended, worker)
            stop.set()
            await running
            await worker.close()
            assert worker.stats.errors == 0
        async with ResultReader(users[Role.READER], "line") as results:
            found = set()
            async for entry_id, result in results:
                found.add(result.id)
                await results.ack(entry_id)
                if len(found) == 29:
                    break
        async with make_client(users[Role.OPERATOR]) as client:
            box = DeadLetterBox(client, users[Role.OPERATOR])
            (letter,) = await box.newest()
            assert await box.replay(letter.dead_id) is not None


def test_server_takes_the_line_as_its_acl_file(tmp_path: Path) -> None:
    line = user_line("camera", access_rules(Role.PRODUCER, "flawstream"), sha256(b"secret").hexdigest(), acl_file=True)
    (tmp_path / "users.acl").write_text(f"user default on nopass ~* +@all\n{line}\n", encoding="utf-8")
    server = Server(tmp_path / "server", f"aclfile {tmp_path / 'users.acl'}")
    with running_server(server), RawRedis(server.port) as raw:
        raw("AUTH", "camera", "secret")
        raw("XADD", "flawstream:images", "*", "category", "bottle", "image", "x")
        with pytest.raises(RuntimeError, match="NOPERM"):
            raw("XRANGE", "flawstream:images", "-", "+")


@pytest.mark.parametrize("name", ["two words", "a)", 'a"b', "", "neue\nzeile", "~*"])
def test_name_that_would_break_a_rule_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        user_line(name, access_rules(Role.READER, "flawstream"))
    with pytest.raises(ConfigError):
        access_rules(Role.READER, name)


def test_line_of_an_acl_file_has_the_same_rules() -> None:
    rules = access_rules(Role.READER, "flawstream")
    command = user_line("line", rules, "0" * 64)
    in_file = user_line("line", rules, "0" * 64, acl_file=True)
    assert command.removeprefix("ACL SETUSER line reset ") == in_file.removeprefix("user line ")
    assert "password" in user_line("line", rules)
