"""References to images, parsed strictly, so that what is compared with the allow-list is what is fetched.

Nothing is corrected: a reference that two programs might parse differently is refused. Knows no network and no storage.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Literal
from urllib.parse import unquote_to_bytes, urlsplit

import idna

MAX_REFERENCE_CHARS = 2048

_PORTS: dict[str, int] = {"http": 80, "https": 443}
_SCHEMES = ("key", "s3", *_PORTS)
_KNOWN = "key:, s3://, http:// and https://"
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_HIDDEN = re.compile(r"%(?:2[eEfF5]|5[cC]|[01][0-9A-Fa-f]|7[fF])")
"""Percent-encoded dots, slashes, percent signs, backslashes and control characters."""
_LONGEST_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Reference:
    """The parts of a reference.

    Attributes:
        scheme: `key`, `s3`, `http` or `https`.
        host: Lower case, ASCII, no trailing dot; an IPv6 address without brackets; the bucket of `s3`.
        port: Of `http` and `https`, never absent; 0 for the others.
        path: From the slash after the host on; for `s3` without that slash; for `key` the whole key.
        query: Of `http` and `https`, without its question mark. It may contain a secret and is never shown.
    """

    scheme: Literal["key", "s3", "http", "https"]
    host: str
    port: int
    path: str
    query: str = field(default="", repr=False)

    def is_below(self, allowed: "Reference") -> bool:
        """Return whether an entry of the allow-list, parsed by `parse_allowed`, covers this."""
        same_place = (self.scheme, self.host, self.port) == (allowed.scheme, allowed.host, allowed.port)
        return same_place and self.path.startswith(allowed.path) and self.path != allowed.path

    def __str__(self) -> str:
        """Return the reference without its query."""
        return shorten(f"{self.scheme}:{self.path}" if self.scheme == "key" else f"{self._base()}{self.path}")

    def _base(self) -> str:
        if self.scheme == "s3":
            return f"s3://{self.host}/"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port == _PORTS[self.scheme] else f':{self.port}'}"


def parse_reference(text: str) -> Reference:
    """Parse a reference.

    Raises:
        ValueError: It is not a reference, or ambiguous. The error's text does not repeat it: it may contain a secret.
    """
    if len(text) > MAX_REFERENCE_CHARS:
        raise ValueError(f"it has {len(text):,} characters and {MAX_REFERENCE_CHARS:,} are allowed")
    if any(unicodedata.category(char)[0] == "C" or unicodedata.category(char) in ("Zl", "Zp") for char in text):
        raise ValueError("it has control characters")
    scheme, colon, rest = text.partition(":")
    match scheme.lower():
        case "key" if colon:
            return Reference("key", "", 0, rest)
        case "s3" if colon:
            return _parse_s3(rest)
        case ("http" | "https") as known if colon:
            return _parse_http(known, text)
        case _:
            raise ValueError(f"it starts with none of {_KNOWN}")


def parse_allowed(text: str) -> Reference:
    """Parse an entry of the allow-list: everything below it is allowed.

    Raises:
        ValueError: It is not a valid entry.
    """
    allowed = parse_reference(text)
    if allowed.scheme == "key":
        if not allowed.path:
            raise ValueError("it allows every key of the server; name what the keys start with, as in key:frames:")
    elif not text.endswith("/"):  # else it would allow https://host/images-of-others too
        raise ValueError("it must end with a slash, as in https://host/images/ or s3://bucket/folder/")
    elif allowed.query:
        raise ValueError("it has a query; leave out everything from the question mark on")
    return allowed


def shorten(text: str) -> str:
    """Shorten a text from outside for a log, and replace characters that cannot be printed."""
    printable = "".join(char if char.isprintable() else "?" for char in text[: _LONGEST_SHOWN + 1])
    return printable if len(printable) <= _LONGEST_SHOWN else f"{printable[:_LONGEST_SHOWN]}..."


def _parse_s3(rest: str) -> Reference:
    if not rest.startswith("//"):
        raise ValueError("it is not of the form s3://bucket/key")
    bucket, _, key = rest[2:].partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("its bucket is not 3 to 63 lower-case letters, digits, dots and hyphens")
    if set("?#\\") & set(key):
        raise ValueError("its key has a question mark, a hash sign or a backslash")
    _refuse_detours(f"/{key}")
    return Reference("s3", bucket, 0, key)


def _parse_http(scheme: Literal["http", "https"], text: str) -> Reference:
    if "#" in text:
        raise ValueError("it has a fragment")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("its host or port cannot be read") from None
    if "@" in parts.netloc:
        raise ValueError("it has a user name or a password in front of the host")
    if not parts.path.startswith("/"):
        raise ValueError(f"it is not of the form {scheme}://host/path")
    if not _PATH.fullmatch(parts.path) or not _QUERY.fullmatch(parts.query):
        raise ValueError("its path or query has characters that must be percent-encoded")
    _refuse_detours(parts.path)
    return Reference(
        scheme, _host(parts.hostname or ""), _PORTS[scheme] if port is None else port, parts.path, parts.query
    )


def _refuse_detours(path: str) -> None:
    """Refuse paths that a server might resolve to one outside the allowed prefix."""
    if "//" in path:
        raise ValueError("its path has doubled slashes")
    if any(segment.partition(";")[0] in (".", "..") for segment in path.split("/")):  # Tomcat drops what follows a `;`
        raise ValueError("its path has the segment . or ..")
    if _HIDDEN.search(path):
        raise ValueError("its path has percent-encoded dots, slashes, backslashes, percent or control characters")
    try:
        unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise ValueError("its path is not UTF-8 once decoded") from None


def _host(host: str) -> str:
    if ":" in host:
        return _ipv6(host)
    try:
        ascii_host = host if host.isascii() else idna.encode(host, uts46=True).decode()
    except idna.IDNAError:
        raise ValueError("its host is no valid name") from None
    labels = ascii_host.lower().removesuffix(".").split(".")
    if sum(map(len, labels)) + len(labels) > 254 or not all(map(_LABEL.fullmatch, labels)):  # noqa: PLR2004 - RFC 1035
        raise ValueError("its host is no valid name")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(".".join(labels)))
        except AddressValueError:
            raise ValueError("its host is a number but not an address of four decimal numbers") from None
    return ".".join(labels)


def _ipv6(host: str) -> str:
    if "%" in host:
        raise ValueError("its address has a zone")
    try:
        address = IPv6Address(host)
    except AddressValueError:
        raise ValueError("its host is no valid address") from None
    return str(address.ipv4_mapped or address)
