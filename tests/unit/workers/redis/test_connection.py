"""The client, and how its exceptions become ours."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import exceptions as client_errors
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import MasterNotFoundError, SlaveNotFoundError

from schemas.errors import ConfigError, StreamUnavailableError
from schemas.settings import RedisSettings
from workers.redis.client import require_server
from workers.redis.connection import PasswordFile, address, make_client
from workers.redis.errors import stream_errors

pytestmark = pytest.mark.anyio

PASSWORD = "correct-horse"  # noqa: S105 - no secret


@pytest.fixture
def client() -> Redis:
    client = make_client(RedisSettings(url="redis://plant:7000/0", username="camera", password=SecretStr(PASSWORD)))
    assert isinstance(client, Redis)
    return client


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
        client_errors.ResponseError("NOREPLICAS Not enough good replicas to write."),
        client_errors.ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed"),
        client_errors.ClusterDownError("The cluster is down"),
        client_errors.ClusterError("TTL exhausted."),
        client_errors.SlotNotCoveredError('Slot "7" is not covered by the cluster.'),
        client_errors.MovedError("7 plant-2:7000"),
        client_errors.AskError("7 plant-2:7000"),
        client_errors.TryAgainError("Multiple keys request during rehashing of slot"),
        client_errors.RedisClusterException("All slots are not covered after query all startup_nodes."),
        MasterNotFoundError("No master found for 'mymaster'"),
        SlaveNotFoundError("No slave found for 'mymaster'"),
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


@pytest.mark.parametrize(
    "error",
    [
        client_errors.ResponseError("WRONGTYPE Operation against a key"),
        client_errors.ClusterCrossSlotError("Keys in request don't hash to the same slot"),
        client_errors.RedisClusterException("EVAL - all keys must map to the same key slot"),
    ],
)
def test_an_error_of_ours_in_a_command_stays_what_it_is(client: Redis, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, stream_errors(client):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "cause",
    [
        client_errors.AuthenticationError("invalid username-password pair or user is disabled."),
        client_errors.NoPermissionError("User camera has no permissions to run the 'cluster|slots' command"),
    ],
)
def test_a_user_refused_by_a_cluster_is_a_matter_of_configuration(client: Redis, cause: Exception) -> None:
    """The client wraps whatever its nodes answer."""
    unreachable = client_errors.RedisClusterException("Redis Cluster cannot be connected.")
    unreachable.__cause__ = cause
    with pytest.raises(ConfigError, match=r"refuses"), stream_errors(client):
        raise unreachable


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "plant:7000"),
        ({"cluster": True, "shards": 4}, "plant:7000 (a cluster)"),
        ({"sentinels": ("b:26379", "a")}, "mymaster (found by the Sentinels a:26379, b:26379)"),
    ],
)
def test_the_client_is_named_without_its_password(settings: dict[str, Any], named: str) -> None:
    client = make_client(
        RedisSettings(url="redis://plant:7000/0", username="camera", password=SecretStr(PASSWORD), **settings)
    )
    assert address(client) == named
    assert PASSWORD not in repr(client)


@pytest.mark.parametrize("url", ["http://plant", "plant:6379", "redis://plant:port/0", ""])
@pytest.mark.parametrize("more", [{}, {"cluster": True, "shards": 4}], ids=["single", "cluster"])
def test_an_unreadable_url_is_refused(url: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        make_client(RedisSettings(url=url, **more))


def test_a_cluster_has_no_databases() -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        make_client(RedisSettings(url="redis://plant:7000/1", cluster=True, shards=4))


@pytest.mark.parametrize("name", ["a:b", "a:1:2", "", ":26379", "user@a:26379", "redis://a:26379"])
def test_a_sentinel_that_is_no_address_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.sentinels"):
        make_client(RedisSettings(sentinels=(name,)))


@pytest.mark.parametrize("line_end", ["", "\n", "\r\n"])
@pytest.mark.parametrize(("url", "username"), [("redis://plant", "camera"), ("redis://camera@plant", None)])
def test_the_password_is_read_from_its_file_without_the_lines_end(
    tmp_path: Path, line_end: str, url: str, username: str | None
) -> None:
    path = tmp_path / "password"
    path.write_bytes(f" {PASSWORD}{line_end}".encode())
    client = make_client(RedisSettings(url=url, username=username, password_file=path))
    assert isinstance(client, Redis)
    provider = client.connection_pool.connection_kwargs["credential_provider"]
    assert provider.get_credentials() == ("camera", f" {PASSWORD}")
    path.write_text("changed", encoding="utf-8")
    assert provider.get_credentials() == ("camera", "changed")


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff" + PASSWORD.encode()])
def test_a_password_file_without_a_password_is_named_and_never_quoted(
    client: Redis, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path}") as raised, stream_errors(client):
        PasswordFile(None, path).get_credentials()
    assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize("name", ["tls_ca_file", "tls_cert_file"])
@pytest.mark.parametrize("content", [None, "no PEM"])
def test_a_tls_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / "file.pem"
    if content:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"redis\.{name} {path} "):
        make_client(RedisSettings(url="rediss://plant", **{name: path}))


@pytest.mark.parametrize("name", ["tls_ca_file", "tls_cert_file", "tls_key_file"])
def test_tls_files_without_tls_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="rediss://"):
        make_client(RedisSettings(url="redis://plant", **{name: tmp_path}))


def test_a_key_without_its_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"redis\.tls_cert_file is not"):
        make_client(RedisSettings(url="rediss://plant", tls_key_file=tmp_path))


def test_sentinels_are_asked_with_the_same_tls_and_timeouts_and_without_the_password() -> None:
    client = make_client(
        RedisSettings(url="rediss://plant", sentinels=("a",), password=SecretStr(PASSWORD), timeout_s=3, block_ms=1)
    )
    assert isinstance(client, Redis)
    (sentinel,) = client.connection_pool.sentinel_manager.sentinels  # type: ignore[attr-defined]  # a pool of Sentinels has it
    to_primary, to_sentinel = client.connection_pool, sentinel.connection_pool
    assert issubclass(to_primary.connection_class, SSLConnection)
    assert issubclass(to_sentinel.connection_class, SSLConnection)
    shared = ("socket_timeout", "socket_connect_timeout", "ssl_check_hostname")
    assert [to_sentinel.connection_kwargs[name] for name in shared] == [3, 3, True]
    assert [to_primary.connection_kwargs[name] for name in shared] == [3, 3, True]
    assert to_primary.connection_kwargs["password"] == PASSWORD
    assert to_sentinel.connection_kwargs.get("password") is None


def test_a_clusters_nodes_are_spoken_to_with_tls() -> None:
    client = make_client(RedisSettings(url="rediss://plant", cluster=True, shards=4))
    assert isinstance(client, RedisCluster)
    assert issubclass(client.connection_kwargs["connection_class"], SSLConnection)
    assert client.connection_kwargs["ssl_check_hostname"] is True


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
