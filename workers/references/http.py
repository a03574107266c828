"""Images on web servers. Redirects, proxies, cookies and ambient credentials are all left out.

The addresses of a name are looked up once, checked, and then connected to: a name that changes between a check and a
connection (DNS rebinding) cannot lead anywhere else.
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
from workers.references.source import PassingError, forbidden, too_large, unavailable

_OK = 200
_REDIRECTS = range(300, 400)
_TRY_AGAIN = frozenset({408, 425, 429})
_BROKEN = range(500, 600)
_CHUNK_BYTES = 1 << 16

_METADATA = frozenset(map(ip_address, ("100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254")))
"""Where clouds tell a machine its credentials (Alibaba, Azure, AWS, Google) and which no class of addresses covers."""
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052


class _ForbiddenAddressError(Exception):
    """A name leads to addresses that no name may lead to."""


class CheckedResolver(AbstractResolver):
    """Looks names up and drops the addresses that a name must not lead to.

    Those are link-local ones (a cloud's metadata), multicast, unspecified, broadcast and loopback; the last is
    allowed to `localhost` only. Private networks are where factories live: they are allowed. An address that stands in
    a reference itself never comes here, and needs no check: it is in the allow-list, digit by digit.

    Args:
        names: What looks names up.
    """

    def __init__(self, names: AbstractResolver) -> None:
        self._names = names

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Give the addresses of a name.

        Raises:
            OSError: It has none.
            _ForbiddenAddressError: It has none that is allowed.
        """
        found = await self._names.resolve(host, port, family)
        allowed = [one for one in found if is_public_or_private(one["host"], localhost=host == "localhost")]
        if not allowed:
            raise _ForbiddenAddressError
        return allowed

    async def close(self) -> None:
        """Close what looks names up."""
        await self._names.close()


class HttpSource:
    """A `Source` on web servers.

    Args:
        max_bytes: Largest image.
        patience_s: Longest wait for a connection, and for the next bytes.
        concurrency: Most connections.
        names: What looks names up; absent: the system.
    """

    def __init__(
        self, max_bytes: int, patience_s: float, concurrency: int, *, names: AbstractResolver | None = None
    ) -> None:
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        self._concurrency = concurrency
        self._names = names
        self._session: ClientSession | None = None

    async def read(self, reference: Reference) -> bytes:
        """Read an image, cut off where it gets too large, whatever the server said before; see `Source`."""
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
            raise PassingError(f"the server does not answer as it should ({type(error).__name__})") from None

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> ClientSession:
        if self._session is None:
            self._session = ClientSession(
                connector=TCPConnector(
                    resolver=CheckedResolver(self._names or ThreadedResolver()),
                    use_dns_cache=False,
                    limit=self._concurrency,
                ),
                timeout=ClientTimeout(total=None, sock_connect=self._patience_s, sock_read=self._patience_s),
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
        if status in _TRY_AGAIN or status in _BROKEN:
            raise PassingError(f"the server answers {status}")
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
    """Tell whether a name may lead to an address.

    Args:
        text: The address, or what no address is.
        localhost: Whether the name is `localhost`, which leads to this machine and nowhere else.
    """
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return all(_is_allowed(one, localhost=localhost) for one in _contained(address))


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


def _contained(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address | IPv6Address]:
    """Give an address, and the IPv4 addresses that it leads to through a gateway."""
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
    """Say where a redirect leads, without a query, a user or a fragment."""
    try:
        parts = urlsplit(response.headers.get("Location", ""))
    except ValueError:
        return "a place that cannot be read"
    return shorten(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()) or "nowhere"
