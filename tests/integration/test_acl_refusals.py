"""Users with the rights of `flawstream acl` on a real server: each is refused whatever is not its job."""

from hashlib import sha256

import pytest
from helpers.acl_plant import PASSWORD, Plant, expect_refusal, run_command
from helpers.streams import single_client

from workers.acl import Role, access_rules, user_line

pytestmark = pytest.mark.anyio


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
        "DEL {seen}",
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
    await run_command(plant.admin, *line.split())
    theirs = plant.as_(Role.SERVICE).model_copy(update={"username": "stranger"})
    async with single_client(theirs) as client:
        await expect_refusal(client, "XADD", plant.keys.images, "*", "a", "b")
