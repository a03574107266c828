"""Makes the client of the stream server: of one server, of the primary that Sentinels name, or of a cluster.

Knows redis-py and nothing of streams, nor of what to do when the server does not answer.
"""

import ssl
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import ConnectionPool, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisClusterException

from schemas.errors import ConfigError
from schemas.settings import RedisSettings

StreamConnection = Redis | RedisCluster
"""A client of one server, of the primary that Sentinels name, or of a cluster."""

_SENTINEL_PORT = 26379
_MOST_CONNECTIONS = 4096
"""Of one client to one server: a read that waits takes one, and there may be one for each of 1024 shards."""


class PasswordFileError(AuthenticationError):
    """The password file cannot be read. redis-py takes it for an error of its own, and drops the connection."""


class PasswordFile(CredentialProvider):
    """Reads the password anew for each connection, so that a changed one is used from then on.

    Args:
        username: The ACL user; absent: the server's default one.
        path: A file with the password, and at most a line's end after it.
    """

    def __init__(self, username: str | None, path: Path) -> None:
        self._username = username
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Read the file.

        Raises:
            PasswordFileError: It cannot be read; the text names the file and never repeats its contents.
        """
        try:
            password = self._path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise PasswordFileError(f"redis.password_file {self._path} cannot be read: {why}") from None
        if not password:
            raise PasswordFileError(f"redis.password_file {self._path} is empty; put the password into it")
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Read the file; it is small, and read once a connection."""
        return self.get_credentials()


def make_client(settings: RedisSettings) -> StreamConnection:
    """Make a client; it connects when it is first used.

    It never retries a command by itself: a repeated XADD writes twice. In a cluster it follows redirections (MOVED,
    ASK), which execute nothing. A command that blocks takes a connection of the pool for itself, so it delays no
    other.

    Through Sentinels, each new connection goes to the server that is the primary at that moment. Sentinels are asked
    without a user or password. With TLS, the addresses that Sentinels and clusters report must be in the servers'
    certificates.

    Raises:
        ConfigError: The URL, an address of a Sentinel or a TLS file cannot be read, or they contradict each other.
    """
    shape = "write redis://host:port/0, or rediss:// for TLS"
    scheme = urlsplit(settings.url).scheme
    if scheme not in ("redis", "rediss"):
        raise ConfigError(f"redis.url has the scheme {scheme!r}; {shape}")
    _check_tls_files(settings, encrypted=scheme == "rediss")
    try:
        target: dict[str, Any] = dict(parse_url(settings.url))
        target.pop("connection_class", None)
        options = _login(settings, target.pop("username", None)) | _wire(settings) | target
        if settings.cluster:
            return _cluster(options)
        if settings.sentinels:
            return _primary(settings, options)
        if options.pop("ssl", False):
            options["connection_class"] = SSLConnection
        return Redis.from_pool(ConnectionPool(**options))
    except (ValueError, TypeError, RedisClusterException) as error:
        # Without the text: it may repeat the URL, and a URL may hold a password.
        raise ConfigError(f"redis.url cannot be read ({type(error).__name__}); {shape}") from None


def address(client: StreamConnection) -> str:
    """Return the server's name for texts: host:port, with the Sentinels or the node by which it is found."""
    if isinstance(client, RedisCluster):
        return f"{client.startup_nodes[0].name} (a cluster)"
    if isinstance(client.connection_pool, _PrimaryPool):
        return client.connection_pool.describe()
    options = client.connection_pool.connection_kwargs
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"


class _Cluster(RedisCluster):
    """A cluster's client, with fixes where redis-py's own hangs, leaks or asks a server that is down."""

    async def __aenter__(self) -> Self:
        """Return the client; it connects when first used, as the other clients do, so that errors rise there."""
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; redis-py leaves them open where the last command failed."""
        await super().aclose()
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")

    async def _determine_slot(self, command: str, *args: Any) -> int:
        """Return a command's slot, without a round trip for a read of one stream.

        redis-py always asks the same server for the position of the key in the command: with that one down, nothing
        could be read from the others.
        """
        if command in ("XREAD", "XREADGROUP"):
            *_, stream, _ = args
            return self.keyslot(stream)
        return await super()._determine_slot(command, *args)


class _PrimaryPool(SentinelConnectionPool):
    """Connections to the primary; closing them closes those to the Sentinels too."""

    def describe(self) -> str:
        """Return the primary's name, with its Sentinels."""
        asked = (sentinel.connection_pool.connection_kwargs for sentinel in self.sentinel_manager.sentinels)
        names = ", ".join(sorted(f"{options['host']}:{options['port']}" for options in asked))
        return f"{self.service_name} (found by the Sentinels {names})"

    async def aclose(self) -> None:
        await super().aclose()
        await self.sentinel_manager.aclose()


def _cluster(options: dict[str, Any]) -> RedisCluster:
    # After MOVED only that slot is updated: to load the whole layout, the client would close connections in use.
    return _Cluster(**{"host": "localhost"} | options, reinitialize_steps=0)


def _primary(settings: RedisSettings, options: dict[str, Any]) -> Redis:
    for not_one_server in ("host", "port"):
        options.pop(not_one_server, None)
    known = [_host_port(name) for name in settings.sentinels]
    sentinels = Sentinel(known, sentinel_kwargs=_wire(settings))  # type: ignore[no-untyped-call]
    client: Redis = sentinels.master_for(settings.sentinel_primary, connection_pool_class=_PrimaryPool, **options)
    return client


def _host_port(name: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{name}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.netloc != name or parts.username is not None:
        raise ConfigError(f"redis.sentinels has {name!r}; write host:port, such as sentinel-0:26379")
    return host, port or _SENTINEL_PORT


def _wire(settings: RedisSettings) -> dict[str, Any]:
    """Return the options of every connection, one to a Sentinel too."""
    options: dict[str, Any] = {
        "socket_timeout": settings.timeout_s,
        "socket_connect_timeout": settings.timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": _MOST_CONNECTIONS,
        "protocol": 2,
        "legacy_responses": False,
        "decode_responses": False,
    }
    if urlsplit(settings.url).scheme == "rediss":
        files = {
            "ssl_ca_certs": settings.tls_ca_file,
            "ssl_certfile": settings.tls_cert_file,
            "ssl_keyfile": settings.tls_key_file,
        }
        options |= {"ssl": True, "ssl_check_hostname": True}
        options |= {name: str(path) for name, path in files.items() if path is not None}
    return options


def _login(settings: RedisSettings, username_in_url: str | None) -> dict[str, Any]:
    username = username_in_url or settings.username
    if settings.password_file is not None:
        return {"credential_provider": PasswordFile(username, settings.password_file)}
    return {
        "username": username,
        "password": settings.password.get_secret_value() if settings.password is not None else None,
    }


def _check_tls_files(settings: RedisSettings, *, encrypted: bool) -> None:
    """Read the TLS files once at the start: later, an error in one looks like a fault of the server."""
    ca, cert, key = settings.tls_ca_file, settings.tls_cert_file, settings.tls_key_file
    if not encrypted:
        if ca or cert or key:
            raise ConfigError("a redis.tls_ file is set and redis.url does not ask for TLS; write rediss://")
        return
    if key and not cert:
        raise ConfigError("redis.tls_key_file is set and its redis.tls_cert_file is not")
    try:
        ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(
            f"redis.tls_ca_file {ca} cannot be read: {error.strerror or error}; name a PEM file"
        ) from None
    if cert:
        try:
            ssl.create_default_context().load_cert_chain(cert, key, password="")  # an encrypted key would ask for it
        except OSError as error:
            raise ConfigError(
                f"redis.tls_cert_file {cert} with redis.tls_key_file {key} cannot be read: {error.strerror or error}; "
                "name PEM files, the key without a password"
            ) from None
