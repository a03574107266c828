"""What tests of more than one folder share: markers, a real Valkey server, asyncio, Hypothesis's settings."""

import socket
from collections.abc import Iterator

import hypothesis
import pytest

from schemas.settings import RedisSettings

pytest.register_assert_rewrite("helpers")  # so that their assertions say as much as a test's
from helpers.places import TESTS  # noqa: E402 - after the line above
from helpers.redis_servers import Server, running  # noqa: E402 - the same

# No test limits how fast a machine must be. The gate tries the same examples every time, so that what passed once
# passes again; `pytest --hypothesis-profile explore` looks for new ones.
hypothesis.settings.register_profile("gate", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("gate")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses among them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the name of its folder."""
    for item in items:
        item.add_marker(item.path.relative_to(TESTS).parts[0])


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run tests marked `anyio` on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give one server for all tests: Valkey, unless TEST_STREAM_SERVER names another program."""
    server = Server(tmp_path_factory.mktemp("valkey"), 'save ""')
    with running(server):
        yield server


@pytest.fixture
def redis_settings(valkey_server: Server) -> RedisSettings:
    """Give the settings of an empty server, with reads that do not wait long."""
    with socket.create_connection(("127.0.0.1", valkey_server.port)) as raw:
        raw.sendall(b"CONFIG SET maxmemory 0\r\nFLUSHALL\r\n")
        replies = b""
        while replies.count(b"\r\n") < 2:
            replies += raw.recv(64)
    assert replies == b"+OK\r\n+OK\r\n"
    return RedisSettings(url=valkey_server.url, block_ms=20)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Give the address of a server that speaks S3, one for all tests of a module."""
    from helpers.s3_server import running_s3  # noqa: PLC0415 - it takes a second to import, and few tests want it

    with running_s3() as address:
        yield address
