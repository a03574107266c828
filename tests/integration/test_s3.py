"""What is kept on S3, from a real server of its protocol on loopback: images by reference, and the registry."""

import hashlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import boto3
import pytest
from helpers.fakes import png
from helpers.registries import make_manifest
from helpers.s3_server import point_to

from flawstream.registry.registry import WEIGHTS_FILE, Registry
from schemas.errors import ConfigError, MessageError, Reason, RegistryError
from schemas.settings import LimitSettings, RedisSettings, ReferenceSettings
from workers.consume.clock import SystemClock
from workers.redis.connection import make_client
from workers.references import ReferenceFetcher
from workers.references import s3 as s3_module

pytestmark = pytest.mark.anyio

LIMITS = LimitSettings(max_image_bytes=1 << 16)
IMAGE = png()


@asynccontextmanager
async def fetching(*allow: str, tries: int = 3) -> AsyncIterator[ReferenceFetcher]:
    client = make_client(RedisSettings())  # never connected to
    fetcher = ReferenceFetcher(ReferenceSettings(allow=allow, tries=tries), LIMITS, client, SystemClock())
    try:
        yield fetcher
    finally:
        await fetcher.close()
        await client.aclose()


async def fetch(fetcher: ReferenceFetcher, text: str) -> bytes:
    async with fetcher.fetch(text) as data:
        return data


async def refusal(fetcher: ReferenceFetcher, text: str) -> tuple[Reason, str]:
    with pytest.raises(MessageError) as caught:
        await fetch(fetcher, text)
    return caught.value.reason, str(caught.value)


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Point S3's clients to the server, with the bucket `photos`."""
    point_to(monkeypatch, s3_server)
    store = boto3.client("s3")
    store.create_bucket(Bucket="photos")
    store.put_object(Bucket="photos", Key="line-1/a b.png", Body=IMAGE)
    store.put_object(Bucket="photos", Key="line-1/large", Body=b"x" * (LIMITS.max_image_bytes + 1))
    store.put_object(Bucket="photos", Key="line-1/empty", Body=b"")
    store.put_object(Bucket="photos", Key="line-1/folder/x", Body=IMAGE)
    store.put_object(Bucket="photos", Key="line-2/a.png", Body=IMAGE)
    yield
    for found in store.list_objects_v2(Bucket="photos").get("Contents", ()):
        store.delete_object(Bucket="photos", Key=found["Key"])
    store.delete_bucket(Bucket="photos")
    store.close()


@pytest.mark.usefixtures("s3_bucket")
async def test_object_of_an_allowed_folder_is_the_image() -> None:
    async with fetching("s3://photos/line-1/") as fetcher:
        for _ in range(2):
            assert await fetch(fetcher, "s3://photos/line-1/a b.png") == IMAGE


@pytest.mark.usefixtures("s3_bucket")
@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("s3://photos/line-2/a.png", Reason.FORBIDDEN_REFERENCE),
        ("s3://photos/line-1/../line-2/a.png", Reason.FORBIDDEN_REFERENCE),
        ("s3://photos/line-1/absent", Reason.UNAVAILABLE_REFERENCE),
        ("s3://photos/line-1/empty", Reason.UNAVAILABLE_REFERENCE),
        ("s3://photos/line-1/folder", Reason.UNAVAILABLE_REFERENCE),
        ("s3://photos/line-1/large", Reason.TOO_LARGE),
        ("s3://no-such-bucket/a", Reason.UNAVAILABLE_REFERENCE),
    ],
)
async def test_object_that_cannot_be_had_says_why(reference: str, reason: Reason) -> None:
    async with fetching("s3://photos/line-1/", "s3://no-such-bucket/") as fetcher:
        assert (await refusal(fetcher, reference))[0] is reason


@pytest.mark.usefixtures("s3_bucket")
async def test_store_that_does_not_answer_is_unavailable_after_so_many_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        async with fetching("s3://photos/", tries=2) as fetcher:
            reason, detail = await refusal(fetcher, "s3://photos/line-1/a.png")
    assert (reason, "2 times" in detail) == (Reason.UNAVAILABLE_REFERENCE, True)


async def test_s3_without_its_package_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"flawstream\[s3\]"):
        async with fetching("s3://photos/"):
            pass


@pytest.mark.usefixtures("s3_bucket")
def test_registry_on_s3_writes_reads_and_promotes_versions() -> None:
    registry = Registry("s3://photos/models")
    assert registry.categories() == []
    first, second = (
        make_manifest(version=version, files={WEIGHTS_FILE: hashlib.sha256(weights).hexdigest()})
        for version, weights in (("v1", b"one"), ("v2", b"two"))
    )
    registry.write(first, {WEIGHTS_FILE: b"one"})
    registry.promote("bottle", "v1")
    registry.write(second, {WEIGHTS_FILE: b"two"})
    assert (registry.versions("bottle"), registry.current("bottle")) == (["v1", "v2"], "v1")
    registry.promote("bottle", "v2")
    another = Registry("s3://photos/models")
    assert (another.categories(), another.currents()) == (["bottle"], {"bottle": "v2"})
    assert another.manifest("bottle", "v2") == second
    assert another.read_file(second, WEIGHTS_FILE) == b"two"
    with pytest.raises(RegistryError):
        registry.write(first, {WEIGHTS_FILE: b"one"})
    with pytest.raises(RegistryError, match="v1, v2"):
        registry.manifest("bottle", "v3")
