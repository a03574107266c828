"""The detector behind a Serve handle: what goes wrong on the way becomes ours, and nothing waits for ever."""

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from flawstream.imaging.pixels import PixelForm
from schemas.errors import DetectorDiedError, DetectorOverloadedError, MessageError, Reason
from schemas.settings import BitDepth
from serving import routing
from serving.deployments import HandleDetector
from serving.routing import Placement, split
from workers.ports import Refusal

pytestmark = pytest.mark.anyio

NEVER_S = 3600.0
IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
FORM = PixelForm(256, "antialias")
OTHER = PixelForm(64)


class Response:
    """What a handle's `remote` gives: to be awaited, or cancelled."""

    def __init__(self, outcome: object) -> None:
        self._outcome = outcome
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        if self._outcome is NOTHING:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self.cancelled = True


NOTHING = object()


class Handle:
    """A Serve handle that gives the outcomes told, one a call, and for `NOTHING` never any."""

    deployment_name = "Detector"

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = list(outcomes)
        self.calls: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.responses: list[Response] = []

    def __getattr__(self, method: str) -> "Method":
        return Method(self, method)


class Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self._name = name

    def remote(self, *arguments: Any) -> Response:
        self._handle.calls.append(self._name)
        self._handle.arguments.append(arguments)
        self._handle.responses.append(Response(self._handle.outcomes.pop(0)))
        return self._handle.responses[-1]


async def test_form_of_a_category_is_asked_for_once_and_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle([FORM], [OTHER], [OTHER])
    detector = HandleDetector(handle, NEVER_S)
    for _ in range(3):
        assert await detector.pixel_forms(["bottle", "bottle"]) == [FORM, FORM]
    assert await detector.pixel_forms(["cable", "bottle"]) == [OTHER, FORM]
    assert handle.calls == ["pixel_forms", "pixel_forms"]
    assert handle.arguments == [(["bottle"],), (["cable"],)]
    monkeypatch.setattr("serving.deployments._FORMS_S", 0.0)
    assert await detector.pixel_forms(["bottle"]) == [OTHER]


async def test_form_is_asked_for_again_after_a_failure() -> None:
    detector = HandleDetector(Handle(ActorDiedError(), [FORM]), NEVER_S)
    with pytest.raises(DetectorOverloadedError):
        await detector.pixel_forms(["bottle"])
    assert await detector.pixel_forms(["bottle"]) == [FORM]


async def test_replica_that_hangs_is_given_up_and_its_call_is_cancelled() -> None:
    handle = Handle(NOTHING)
    with pytest.raises(DetectorOverloadedError, match=r"within 0\.01 s \(detector\.timeout_s\)"):
        await HandleDetector(handle, 0.01).detect(IMAGES, ["bottle"])
    assert handle.responses[0].cancelled


@pytest.mark.parametrize(
    "error",
    [
        ObjectLostError("1", None, ""),
        BackPressureError(num_queued_requests=3, max_queued_requests=2),
        RequestCancelledError("1"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_call_that_no_replica_took_may_be_made_again(error: Exception) -> None:
    with pytest.raises(DetectorOverloadedError, match="no detector replica took the call") as caught:
        await HandleDetector(Handle(error), NEVER_S).detect(IMAGES, ["bottle"])
    assert "\n" not in str(caught.value)


async def test_replica_that_ends_with_a_batch_is_told_from_one_that_is_busy() -> None:
    with pytest.raises(DetectorDiedError, match="died during a call with 1 images"):
        await HandleDetector(Handle(ActorDiedError()), NEVER_S).detect(IMAGES, ["bottle"])


def raised_in_a_replica(error: Exception) -> Exception:
    wrapped: Callable[[], Exception] = RayTaskError("detect", "Traceback of the replica", error).as_instanceof_cause
    return wrapped()


async def test_error_raised_in_a_replica_comes_out_without_the_replica_s_traceback() -> None:
    error = raised_in_a_replica(MessageError(Reason.TOO_LARGE, "too much"))
    with pytest.raises(MessageError) as caught:
        await HandleDetector(Handle(error), NEVER_S).detect(IMAGES, ["bottle"])
    assert (type(caught.value), str(caught.value)) == (MessageError, "too much")
    assert caught.value.reason is Reason.TOO_LARGE


async def test_timeout_raised_in_a_replica_is_not_taken_for_our_own() -> None:
    with pytest.raises(RayTaskError):
        await HandleDetector(Handle(raised_in_a_replica(TimeoutError())), NEVER_S).detect(IMAGES, ["bottle"])


CATEGORIES = [f"part-{number}" for number in range(8)]
BATCH = np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)


@pytest.fixture
def two_replicas(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Have two replicas into each of which the categories do not fit; gives the rows of each one's call."""
    placement = Placement(frozenset({"one", "other"}), categories_fit=False)
    monkeypatch.setattr(routing, "_placements", {"Detector": placement})
    return split(CATEGORIES, placement)


async def test_each_replica_gets_the_images_of_its_categories_and_judgements_come_back_in_order(
    two_replicas: list[list[int]],
) -> None:
    handle = Handle(*([Refusal(Reason.POISON, str(row)) for row in rows] for rows in two_replicas))
    depths: list[BitDepth | None] = [12, None, 12, 12, None, 10, 16, None]
    judgements = await HandleDetector(handle, NEVER_S).detect(BATCH, CATEGORIES, depths)
    assert [one.detail for one in judgements if isinstance(one, Refusal)] == [str(row) for row in range(8)]
    assert len(handle.arguments) == 2
    for (images, categories, read_by), rows in zip(handle.arguments, two_replicas, strict=True):
        assert categories == [CATEGORIES[row] for row in rows]
        assert images[:, 0, 0, 0].tolist() == rows
        assert read_by == [depths[row] for row in rows]


async def test_batch_is_judged_again_as_a_whole_where_one_of_its_calls_fails(two_replicas: list[list[int]]) -> None:
    handle = Handle([Refusal(Reason.POISON, "")] * len(two_replicas[0]), ActorDiedError())
    with pytest.raises(DetectorDiedError):
        await HandleDetector(handle, NEVER_S).detect(BATCH, CATEGORIES)
