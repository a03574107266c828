"""The HTTP API with a fake detector and a fake stream, called without a socket."""

from collections.abc import AsyncIterator, Mapping
from datetime import datetime

import httpx

from helpers.fakes import FakeDetector
from schemas.settings import ApiSettings, LimitSettings
from serving.api.api import build_api

LIMITS = LimitSettings(max_image_bytes=4096, max_pixels=10_000)


class FakePusher:
    """A `Pusher` that keeps what it was given. `failures` are raised, one a call."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.pushed: list[dict[str, object]] = []

    async def push(
        self,
        image: bytes,
        category: str,
        *,
        id: str | None = None,  # noqa: A002 - the field's name on the wire
        captured_at: datetime | None = None,
        traceparent: str | None = None,
    ) -> str:
        if self.failures:
            raise self.failures.pop(0)
        fields: dict[str, object] = {"image": image, "category": category, "id": id, "captured_at": captured_at}
        self.pushed.append(fields | {"traceparent": traceparent})
        return f"1-{len(self.pushed)}"


class Bench:
    """An API, its detector, its stream, and what its status says."""

    def __init__(self, settings: ApiSettings | None = None) -> None:
        self.detector = FakeDetector()
        self.pusher = FakePusher()
        self.status: dict[str, object] | Exception = {"detector": {"images": 3}, "worker": {"read": 5}}
        api = build_api(self.detector, self.pusher, self._tell, settings or ApiSettings(), LIMITS)
        self.api = api
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")

    async def _tell(self) -> dict[str, object]:
        if isinstance(self.status, Exception):
            raise self.status
        return self.status

    async def push(self, data: bytes, headers: Mapping[str, str] | None = None, **query: str) -> httpx.Response:
        return await self.client.post(
            "/v1/images", params={"category": "bottle"} | query, content=data, headers=headers
        )

    async def detect(self, data: bytes | AsyncIterator[bytes], **query: str) -> httpx.Response:
        return await self.client.post("/v1/detect", params={"category": "bottle"} | query, content=data)


def refusal(response: httpx.Response) -> tuple[int, str]:
    """Read a refusal; nothing of our insides may be in any."""
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    problem = response.json()
    assert set(problem) == {"reason", "detail"}
    assert problem["detail"]
    return response.status_code, problem["reason"]
