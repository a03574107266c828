"""Images on web servers, without redirects, proxies, cookies or ambient credentials.

A name's addresses are resolved once, checked, and then connected to: a name that changes between check and connection
(DNS rebinding) leads nowhere else.
"""

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from schemas.references import Reference, shorten
from workers.references.source import RetryableError, forbidden, too_large, unavailable

_OK = 200
_REDIRECTS = range(300, 400)
_RETRIED = frozenset({408, 425, 429})
_SERVER_ERRORS = range(500, 600)
_CHUNK_BYTES = 1 << 16

_METADATA = frozenset(
    ip_address(address)
    for address in (
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # AWS
        "fd00:42::42",  # Scaleway
        "fd20:ce::254",  # Google
    )
)
"""Addresses from which a cloud's machines get their credentials, in none of the classes below."""
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052


class _ForbiddenAddressError(Exception):
    """A name resolves only to addresses that no name may resolve to."""


class CheckedResolver(AbstractResolver):
    """Resolves names and drops the addresses that a name must not resolve to.

    Those are link-local (a cloud's metadata), multicast, unspecified, broadcast and loopback; the last is allowed for
    `localhost` only. Private networks are allowed: factories use them. An address in a reference itself is not
    resolved and needs no check: the allow-list has it, digit by digit.

    Args:
        resolver: Resolves the names.
    """

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the allowed addresses of a name.

        Raises:
            OSError: The name has no address.
            _ForbiddenAddressError: None of its addresses is allowed.
        """
        found = await self._resolver.resolve(host, port, family)
        allowed = [result for result in found if is_public_or_private(result["host"], localhost=host == "localhost")]
        if not allowed:
            raise _ForbiddenAddressError
        return allowed

    async def close(self) -> None:
        """Close the resolver."""
        await self._resolver.close()


class HttpSource:
    """A `Source` on web servers.

    Args:
        max_bytes: Largest image.
        timeout_s: Longest wait for a connection, and for the next bytes.
        concurrency: Most connections.
        resolver: Resolves names; absent: the system's.
    """

    def __init__(
        self, max_bytes: int, timeout_s: float, concurrency: int, *, resolver: AbstractResolver | None = None
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._resolver = resolver
        self._session: ClientSession | None = None

    async def read(self, reference: Reference) -> bytes:
        """Read an image, and stop where it gets too large, whatever its Content-Length; see `Source`."""
        url = URL.build(
            scheme=reference.scheme,
            host=reference.host,
            port=reference.port,
            path=reference.path,
            query_string=reference.query,
            encoded=True,
        )
        try:
            async with self._open().get(url, allow_redirects=False) as response:
                self._check(reference, response)
                return await self._receive(reference, response)
        except _ForbiddenAddressError:
            raise forbidden(
                reference,
                "its host leads to a loopback, link-local, multicast or metadata address; where that is meant, "
                "references.allow must name the address itself",
            ) from None
        except (ClientError, OSError, ValueError) as error:  # their texts may hold the URL, and that a secret
            raise RetryableError(f"the server does not answer as it should ({type(error).__name__})") from None

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> ClientSession:
        if self._session is None:
            self._session = ClientSession(
                connector=TCPConnector(
                    resolver=CheckedResolver(self._resolver or ThreadedResolver()),
                    use_dns_cache=False,
                    limit=self._concurrency,
                ),
                timeout=ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=self._timeout_s),
                headers={"Accept-Encoding": "identity", "User-Agent": "flawstream"},
                cookie_jar=DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,  # neither proxies nor .netrc
            )
        return self._session

    def _check(self, reference: Reference, response: ClientResponse) -> None:
        status = response.status
        if status in _REDIRECTS:
            raise forbidden(reference, f"the server redirects to {_target(response)}, and redirects are not followed")
        if status in _RETRIED or status in _SERVER_ERRORS:
            raise RetryableError(f"the server answers {status}")
        if status != _OK:
            raise unavailable(reference, f"the server answers {status}")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise unavailable(reference, f"the server compresses it ({shorten(encoding)}), which was not asked for")
        if response.content_length is not None and response.content_length > self._max_bytes:
            raise too_large(reference, response.content_length, self._max_bytes)

    async def _receive(self, reference: Reference, response: ClientResponse) -> bytes:
        data = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            data += chunk
            if len(data) > self._max_bytes:
                raise too_large(reference, None, self._max_bytes)
        if not data:
            raise unavailable(reference, "the server sends nothing")
        return bytes(data)


def is_public_or_private(text: str, *, localhost: bool) -> bool:
    """Return whether a name may resolve to an address.

    Args:
        text: The address; False for any other text.
        localhost: Whether the name is `localhost`, which may resolve to loopback addresses only.
    """
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return all(_is_allowed(each, localhost=localhost) for each in _embedded(address))


def _is_allowed(address: IPv4Address | IPv6Address, *, localhost: bool) -> bool:
    if address.is_loopback:
        return localhost
    return not (
        localhost
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (address.is_reserved and address not in _NAT64)
        or address in _METADATA
        or (isinstance(address, IPv4Address) and address.packed[0] == 0)  # RFC 1122: this network
    )


def _embedded(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address | IPv6Address]:
    """Yield an address, and the IPv4 addresses embedded in it, to which a gateway forwards."""
    if isinstance(address, IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _NAT64:
        yield IPv4Address(address.packed[-4:])


def _target(response: ClientResponse) -> str:
    """Return the target of a redirect, without its query, user and fragment."""
    try:
        parts = urlsplit(response.headers.get("Location", ""))
    except ValueError:
        return "a place that cannot be read"
    return shorten(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()) or "nowhere"
