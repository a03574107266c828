"""The client, and how its exceptions become ours."""

import pytest
from pydantic import SecretStr
from redis import exceptions as client_errors
from redis.asyncio import Redis

from schemas.errors import ConfigError, StreamUnavailableError
from schemas.settings import RedisSettings
from workers.connection import address, make_client, require_server, stream_errors

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

PASSWORD = "correct-horse"  # noqa: S105 - no secret


@pytest.fixture
def client() -> Redis:
    return make_client(RedisSettings(url="redis://plant:7000/0", username="camera", password=SecretStr(PASSWORD)))


@pytest.mark.parametrize(
    "error",
    [
        client_errors.ConnectionError("Error 111 connecting to plant:7000"),
        client_errors.TimeoutError("Timeout reading from plant:7000"),
        client_errors.BusyLoadingError("Redis is loading the dataset in memory"),
        client_errors.ReadOnlyError("You can't write against a read only replica."),
        client_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        client_errors.MasterDownError("Link with MASTER is down"),
        client_errors.MaxConnectionsError("Too many connections"),
        client_errors.ResponseError("BUSY Redis is busy running a script."),
        client_errors.ResponseError("MISCONF Errors writing to the AOF file"),
    ],
)
def test_what_passes_is_a_stream_that_is_unavailable(client: Redis, error: Exception) -> None:
    with pytest.raises(StreamUnavailableError, match="plant:7000") as raised, stream_errors(client):
        raise error
    assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        client_errors.AuthenticationError("invalid username-password pair or user is disabled."),
        client_errors.NoPermissionError("User camera has no permissions to run the 'xadd' command"),
    ],
)
def test_a_refused_user_is_a_matter_of_configuration(client: Redis, error: Exception) -> None:
    with pytest.raises(ConfigError, match="plant:7000") as raised, stream_errors(client):
        raise error
    assert PASSWORD not in str(raised.value)


def test_an_error_of_ours_in_a_command_stays_what_it_is(client: Redis) -> None:
    with pytest.raises(client_errors.ResponseError, match="WRONGTYPE"), stream_errors(client):
        raise client_errors.ResponseError("WRONGTYPE Operation against a key")


def test_no_command_is_repeated_by_the_client_itself(client: Redis) -> None:
    retry = client.get_retry()
    assert retry is not None
    assert retry.get_retries() == 0


def test_the_client_is_named_by_host_and_port_only(client: Redis) -> None:
    assert address(client) == "plant:7000"
    assert PASSWORD not in repr(client)


@pytest.mark.parametrize("url", ["http://plant", "plant:6379", "redis://plant:port/0", ""])
def test_an_unreadable_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        make_client(RedisSettings(url=url))


@pytest.fixture
def version(client: Redis, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Have the server say that it is of this version."""

    async def info(_: str) -> dict[str, str]:
        return {"redis_version": request.param}

    monkeypatch.setattr(client, "info", info)
    return str(request.param)


@pytest.mark.parametrize("version", ["6.2.14", "5.0.0"], indirect=True)
async def test_an_old_server_is_refused(client: Redis, version: str) -> None:
    with pytest.raises(ConfigError, match=version):
        await require_server(client)


@pytest.mark.parametrize("version", ["7.0.0", "7.2.4", "10.1.0"], indirect=True)
@pytest.mark.usefixtures("version")
async def test_a_server_that_runs_our_scripts_is_taken(client: Redis) -> None:
    await require_server(client)


async def test_a_server_that_withholds_its_version_is_taken_as_it_is(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def info(section: str) -> dict[str, str]:
        asked.append(section)
        raise client_errors.NoPermissionError("User camera has no permissions to run the 'info' command")

    monkeypatch.setattr(client, "info", info)
    await require_server(client)
    assert asked == ["server"]
