"""What the fuzz pushes: entries that must be refused, each with the reasons that are right, and good ones in between.

The same seed makes the same entries. Knows no server.
"""

import base64
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from schemas.errors import Reason
from soak.fuzz_images import FORMATS, bomb, foreign, oblong, photograph, spoil

CATEGORY = "bottle"
MAX_IMAGE_BYTES = 1 << 20
"""`limits.max_image_bytes` of the fuzzed worker: smaller than the default, so that entries past it are cheap."""
KEY_PREFIX, S3_PREFIX, WEB_PATH = "key:frames:", "s3://photos/line-1/", "/images/"
"""What the fuzzed worker's allow-list has; the web server's address is known once it runs."""
_GOOD_SHARE = 0.1

Fields = dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class FuzzEntry:
    """One entry to push.

    Attributes:
        kind: What is wrong with it.
        fields: Of the XADD.
        reasons: Any of these is right for its dead letter.
        may_pass: A result is right too, or alone where there are no reasons.
    """

    kind: str
    fields: Fields
    reasons: frozenset[Reason]
    may_pass: bool = False


def corpus(seed: int, count: int, web: str) -> Iterator[FuzzEntry]:
    """Make entries until so many of them are sure to be refused.

    Args:
        seed: Of everything that is by chance.
        count: Entries that no decoder could accept. Good ones and readable ones come on top.
        web: `host:port` of the web server that is on the allow-list.
    """
    chance = random.Random(seed)  # noqa: S311 - it is to be repeatable
    makers: tuple[Callable[[], FuzzEntry], ...] = (
        lambda: _image(chance),
        lambda: _field(chance),
        lambda: _reference(chance, web),
    )
    number = refused = 0
    while refused < count:
        number += 1
        entry = _good(chance) if chance.random() < _GOOD_SHARE else chance.choices(makers, (60, 22, 18))[0]()
        refused += not entry.may_pass
        yield FuzzEntry(entry.kind, {b"id": f"fuzz-{number}".encode()} | entry.fields, entry.reasons, entry.may_pass)


def _good(chance: random.Random) -> FuzzEntry:
    fields = {b"category": CATEGORY.encode(), b"image": photograph(chance, chance.choice(FORMATS))}
    if chance.random() < 0.2:
        fields[b"traceparent"] = chance.randbytes(chance.randint(0, 80))
        return FuzzEntry("good, traceparent garbage", fields, frozenset(), may_pass=True)
    return FuzzEntry("good", fields, frozenset(), may_pass=True)


def _image(chance: random.Random) -> FuzzEntry:
    make = chance.choices((spoil, bomb, oblong, foreign), (80, 12, 4, 4))[0]
    image = make(chance)
    fields = {b"category": CATEGORY.encode(), b"image": image.data}
    if chance.random() < 0.1:
        fields[b"traceparent"] = chance.randbytes(chance.randint(0, 80))
    return FuzzEntry(image.kind, fields, image.reasons, image.readable)


def _field(chance: random.Random) -> FuzzEntry:
    name, change, reason = chance.choice(_FIELD_FAULTS)
    fields = {b"category": CATEGORY.encode(), b"image": photograph(chance, chance.choice(FORMATS))}
    for key, value in change(chance).items():
        if value is None:
            fields.pop(key, None)
        else:
            fields[key] = value
    if not fields:
        fields[b"note"] = b"nothing else"
    return FuzzEntry(name, fields, frozenset({reason}))


def _reference(chance: random.Random, web: str) -> FuzzEntry:
    kind, reason, text = chance.choice(_REFERENCES)
    port = web.rpartition(":")[2]
    reference = (
        text.replace("{web}", web).replace("{port}", port).replace("{n}", str(chance.randint(1, 10**9)))
        if "{" in text
        else text
    )
    fields = {b"category": CATEGORY.encode(), b"image_ref": reference.encode()}
    return FuzzEntry(f"reference, {kind}", fields, frozenset({reason}))


def _bytes_that_are_no_text(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randint(0, 40)) + b"\xff" + chance.randbytes(chance.randint(0, 40))


_WRONG_CATEGORIES = (
    b"../etc",
    b"a/b",
    b".hidden",
    b"-x",
    b"a b",
    b"bottle\n",
    b"\x00",
    b"[1]",
    b"b\xc3\xbc",
    b"*",
    b"%2e",
)
_WRONG_DATES = (
    b"yesterday",
    b"2026-13-45T00:00:00Z",
    b"2026-11-23T25:00:00Z",
    b"2026-02-30T00:00:00Z",
    b"2026-11-23T13:45:00",
    b"2026-11-23",
    b"23.11.2026 13:45",
    b"nan",
    b"0x10",
    b"{}",
    b"",
    b"2026-11-23T13:45:00+99:00",
    b"\x00",
)
_NO_IMAGES = (
    b"0",
    b"-1.5",
    b"null",
    b"{}",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"<!DOCTYPE html><html></html>",
    b"%PDF-1.7\n%%EOF",
    b"PK\x03\x04" + bytes(64),
    b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",  # how a pickle starts
    b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"II*\x00",
    b"MM\x00*",
    b"BM",
    b"RIFF\x00\x00\x00\x00WEBP",
    b"/etc/passwd",
)
_Change = Callable[[random.Random], dict[bytes, bytes | None]]
_FIELD_FAULTS: tuple[tuple[str, _Change, Reason], ...] = (
    ("image absent", lambda _: {b"image": None}, Reason.MALFORMED),
    ("image empty", lambda _: {b"image": b""}, Reason.MALFORMED),
    ("image and reference empty", lambda _: {b"image": b"", b"image_ref": b""}, Reason.MALFORMED),
    (
        "image under another name",
        lambda c: {b"image": None, c.choice((b"Image", b"img", b"\xffimage")): b"x"},
        Reason.MALFORMED,
    ),
    ("image and reference", lambda c: {b"image_ref": f"key:frames:{c.random()}".encode()}, Reason.MALFORMED),
    ("reference no text", lambda c: {b"image": None, b"image_ref": _bytes_that_are_no_text(c)}, Reason.MALFORMED),
    ("all fields absent", lambda _: {b"image": None, b"category": None}, Reason.MALFORMED),
    ("category absent", lambda _: {b"category": None}, Reason.MALFORMED),
    ("category empty", lambda _: {b"category": b""}, Reason.MALFORMED),
    ("category wrong", lambda c: {b"category": c.choice(_WRONG_CATEGORIES)}, Reason.MALFORMED),
    ("category no text", lambda c: {b"category": _bytes_that_are_no_text(c)}, Reason.MALFORMED),
    ("category JSON", lambda c: {b"category": json.dumps({"name": c.random()}).encode()}, Reason.MALFORMED),
    ("category long", lambda c: {b"category": b"x" * c.randint(129, 60_000)}, Reason.MALFORMED),
    ("category unknown", lambda c: {b"category": f"no-such-{c.randint(1, 99)}".encode()}, Reason.UNKNOWN_CATEGORY),
    ("category a number", lambda c: {b"category": str(c.random()).encode()}, Reason.UNKNOWN_CATEGORY),
    ("id no text", lambda c: {b"id": _bytes_that_are_no_text(c)}, Reason.MALFORMED),
    ("id long", lambda c: {b"id": b"x" * c.randint(257, 60_000)}, Reason.MALFORMED),
    ("id of a megabyte", lambda c: {b"id": c.randbytes(16) * (1 << 16)}, Reason.TOO_LARGE),
    ("date wrong", lambda c: {b"captured_at": c.choice(_WRONG_DATES)}, Reason.MALFORMED),
    ("date no text", lambda c: {b"captured_at": _bytes_that_are_no_text(c)}, Reason.MALFORMED),
    ("image no image", lambda c: {b"image": c.choice(_NO_IMAGES)}, Reason.UNDECODABLE),
    ("image noise", lambda c: {b"image": c.randbytes(c.randint(1, 4096))}, Reason.UNDECODABLE),
    (
        "image base64",
        lambda c: {b"image": base64.b64encode(photograph(c, c.choice(FORMATS)))},
        Reason.UNDECODABLE,
    ),
    ("image of megabytes", lambda c: {b"image": c.randbytes(64) * (MAX_IMAGE_BYTES // 64) + b"x"}, Reason.TOO_LARGE),
    ("field of a megabyte", lambda c: {b"note": c.randbytes(16) * (1 << 16)}, Reason.TOO_LARGE),
    ("field name of a megabyte", lambda c: {c.randbytes(16) * (1 << 16): b""}, Reason.TOO_LARGE),
    (
        "thousands of fields",
        lambda c: {f"field-{k}".encode(): b"" for k in range(c.randint(1_000, 6_000))},
        Reason.TOO_LARGE,
    ),
    (
        "traceparent garbage and category unknown",
        lambda c: {b"traceparent": c.randbytes(80), b"category": b"no-such"},
        Reason.UNKNOWN_CATEGORY,
    ),
)

_REFERENCES = tuple(
    (kind, reason, text)
    for kind, reason, texts in (
        (
            "local files",
            Reason.FORBIDDEN_REFERENCE,
            (
                "/etc/passwd",
                "../../etc/passwd",
                "file:///etc/passwd",
                "FILE:///etc/shadow",
                "file://localhost/etc/passwd",
                "local:///etc/passwd",
                "C:\\Windows\\win.ini",
                "\\\\server\\share\\{n}",
            ),
        ),
        (
            "other schemes",
            Reason.FORBIDDEN_REFERENCE,
            (
                "ftp://{web}/images/{n}",
                "gopher://{web}/_GET{n}",
                "dict://{web}/{n}",
                "data:image/png;base64,AAAA",
                "unix:///var/run/docker.sock",
                "http+unix://%2Fvar%2Frun%2Fdocker.sock/images/{n}",
                "redis://{web}/{n}",
                "simplecache::http://{web}/images/{n}",
                "gs://photos/line-1/{n}",
            ),
        ),
        (
            "metadata",
            Reason.FORBIDDEN_REFERENCE,
            (
                "http://169.254.169.254/latest/meta-data/{n}",
                "http://[::ffff:169.254.169.254]/latest/{n}",
                "http://[fe80::1]/{n}",
                "http://2852039166/latest/{n}",
                "http://0xa9fea9fe/latest/{n}",
                "http://0251.0376.0251.0376/{n}",
                "http://169.254.43518/{n}",
                "http://metadata.google.internal/{n}",
            ),
        ),
        (
            "this machine by other names",
            Reason.FORBIDDEN_REFERENCE,
            (
                "http://127.0.0.1:{port}/images/{n}",
                "http://127.1:{port}/images/{n}",
                "http://2130706433:{port}/images/{n}",
                "http://0x7f000001:{port}/images/{n}",
                "http://0177.0.0.1:{port}/images/{n}",
                "http://0:{port}/images/{n}",
                "http://0.0.0.0:{port}/images/{n}",
                "http://[::1]:{port}/images/{n}",
                "http://[::ffff:127.0.0.1]:{port}/images/{n}",
                "http://a.localhost:{port}/images/{n}",
                "http://localhost..:{port}/images/{n}",
            ),
        ),
        (
            "another host, port or scheme",
            Reason.FORBIDDEN_REFERENCE,
            (
                "http://localhost/images/{n}",
                "https://{web}/images/{n}",
                "http://localhost.evil.example:{port}/images/{n}",
                "http://evil-localhost:{port}/images/{n}",
                "http://evil.example/{web}/images/{n}",
                "http://{web}1/images/{n}",
                "http://localhost:99999/images/{n}",
            ),
        ),
        (
            "user names",
            Reason.FORBIDDEN_REFERENCE,
            (
                "http://{web}@evil.example/images/{n}",
                "http://evil.example@{web}/images/{n}",
                "http://user:password@{web}/images/{n}",
                "http://evil.example#@{web}/images/{n}",
                "http://evil.example\\@{web}/images/{n}",
            ),
        ),
        (
            "traversal",
            Reason.FORBIDDEN_REFERENCE,
            (
                "http://{web}/images/../secrets/{n}",
                "http://{web}/images/./../secrets/{n}",
                "http://{web}/images/%2e%2e/secrets/{n}",
                "http://{web}/images/.%2E/secrets/{n}",
                "http://{web}/images/..%2fsecrets/{n}",
                "http://{web}/images/..%5csecrets/{n}",
                "http://{web}/images/%252e%252e/secrets/{n}",
                "http://{web}/images/..;/secrets/{n}",
                "http://{web}/images/%c0%ae%c0%ae/secrets/{n}",
                "http://{web}//images/{n}",
                "http://{web}/images//{n}",
                "http://{web}/images\\..\\secrets\\{n}",
                "http://{web}/images",
                "http://{web}/images-of-others/{n}",
                "http://{web}/secrets/{n}",
                "s3://photos/line-1/../line-2/{n}",
                "s3://photos/line-2/{n}",
                "s3://photos-of-others/line-1/{n}",
                "key:flawstream:images",
                "key:frame:{n}",
            ),
        ),
        (
            "control characters",
            Reason.FORBIDDEN_REFERENCE,
            (
                "http://{web}/images/{n}\r\nHost: evil.example",
                "http://{web}/images/{n}%0d%0aX: y",
                "http://{web}/images/\x00{n}",
                "http://local\thost:{port}/images/{n}",
                "key:frames:{n}\n",
                "http://{web}/images/{n}#fragment",
            ),
        ),
        ("too long", Reason.FORBIDDEN_REFERENCE, ("key:frames:{n}" + "x" * 3_000,)),
        ("redirect", Reason.FORBIDDEN_REFERENCE, ("http://{web}/images/redirect?{n}",)),
        ("nothing there", Reason.UNAVAILABLE_REFERENCE, ("http://{web}/images/absent-{n}", "key:frames:absent-{n}")),
        ("in trouble", Reason.UNAVAILABLE_REFERENCE, ("http://{web}/images/broken?{n}",)),
        ("compressed", Reason.UNAVAILABLE_REFERENCE, ("http://{web}/images/gzip?{n}",)),
        ("of another type", Reason.UNAVAILABLE_REFERENCE, ("key:frames:list",)),
        ("endless", Reason.TOO_LARGE, ("http://{web}/images/endless?{n}",)),
        ("too large", Reason.TOO_LARGE, ("key:frames:large",)),
        ("no image", Reason.UNDECODABLE, ("key:frames:text", "http://{web}/images/text?{n}")),
    )
    for text in texts
)
