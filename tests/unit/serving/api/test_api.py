"""The HTTP API over a fake detector: health, images judged, and its documentation."""

import base64
import io
import json
import re
from collections.abc import AsyncIterator

import cv2
import numpy as np
import pytest
from helpers.api_bench import LIMITS, Bench, refusal
from helpers.fakes import png

from flawstream.imaging.maps import decode_map
from schemas.errors import DetectorOverloadedError, MessageError, Reason
from schemas.messages import AnomalyMap, MapCodec
from workers.ports import Deferral, Refusal

pytestmark = pytest.mark.anyio


async def test_healthz_says_that_the_process_lives(bench: Bench) -> None:
    response = await bench.client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_readyz_passes_on_what_the_service_says(bench: Bench) -> None:
    response = await bench.client.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "detector": {"images": 3}, "worker": {"read": 5}}


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (DetectorOverloadedError("no replica took the call"), "no replica took the call"),
        (RuntimeError('Traceback\n  File "x.py", line 1'), "RuntimeError"),
    ],
)
async def test_readyz_is_503_and_says_why_when_not_ready(bench: Bench, error: Exception, detail: str) -> None:
    bench.status = error
    response = await bench.client.get("/readyz")
    assert refusal(response) == (503, "not_ready")
    assert detail in response.json()["detail"]
    assert response.headers["Retry-After"] == "1"


async def test_image_is_judged_without_a_map_by_default(bench: Bench) -> None:
    response = await bench.detect(png(50, (30, 40)), id="cam1-7")
    assert response.status_code == 200
    answer = response.json()
    assert (answer["id"], answer["category"], answer["verdict"]) == ("cam1-7", "bottle", "normal")
    assert (answer["score"], answer["threshold"], answer["p_value"]) == (0.5, 1.0, 0.25)
    assert answer["model"] == "bottle@v1"
    assert answer["image_shape"] == [30, 40]
    assert answer["map"] is None
    assert answer["total_ms"] >= answer["detect_ms"] >= 0
    assert bench.detector.batches == [["bottle"]]


async def test_image_without_an_id_is_given_one(bench: Bench) -> None:
    ids = {(await bench.detect(png())).json()["id"] for _ in range(3)}
    assert len(ids) == 3


async def test_anomalous_image_has_boxes(bench: Bench) -> None:
    answer = (await bench.detect(png(200, (30, 40)))).json()
    assert answer["verdict"] == "anomalous"
    (box,) = answer["boxes"]
    assert box == {"x": 0, "y": 0, "width": 40, "height": 30, "score": 2.0}


@pytest.mark.parametrize("codec", [MapCodec.GRID_F16, MapCodec.F16, MapCodec.PNG16])
async def test_map_comes_back_as_the_detector_gave_it(bench: Bench, codec: MapCodec) -> None:
    answer = (await bench.detect(png(50), map=codec)).json()["map"]
    data = base64.b64decode(answer.pop("data"), validate=True)
    decoded = decode_map(AnomalyMap(data=data, **answer))
    np.testing.assert_allclose(decoded, np.full((8, 8), 0.5), atol=1e-3)


async def test_heatmap_is_a_jpeg(bench: Bench) -> None:
    answer = (await bench.detect(png(50), map="heatmap-jpeg")).json()["map"]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(answer["data"]), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape == (*answer["shape"], 3)


async def test_body_past_the_limit_is_413_and_read_no_further_whatever_content_length_says(bench: Bench) -> None:
    sent = io.BytesIO()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            sent.write(bytes(1024))
            yield bytes(1024)

    request = bench.client.build_request(
        "POST", "/v1/detect", params={"category": "bottle"}, content=endless(), headers={"Content-Length": "10"}
    )
    response = await bench.client.send(request)
    assert refusal(response) == (413, "too_large")
    assert len(sent.getvalue()) <= LIMITS.max_image_bytes + 1024
    assert bench.detector.batches == []


async def test_image_of_too_many_pixels_is_413(bench: Bench) -> None:
    assert refusal(await bench.detect(png(0, (101, 100)))) == (413, "too_large")


@pytest.mark.parametrize("data", [b"no image", png()[:40]], ids=["text", "half a PNG"])
async def test_bytes_that_are_no_image_are_415(bench: Bench, data: bytes) -> None:
    assert refusal(await bench.detect(data)) == (415, "undecodable")


async def test_unknown_category_is_404(bench: Bench) -> None:
    bench.detector.unknown["nope"] = Refusal(Reason.UNKNOWN_CATEGORY, "category 'nope' has no version")
    response = await bench.detect(png(), category="nope")
    assert refusal(response) == (404, "unknown_category")
    assert response.json()["detail"] == "category 'nope' has no version"


async def test_category_whose_version_cannot_be_used_now_is_503(bench: Bench) -> None:
    bench.detector.unknown["cap"] = Deferral("the current version of 'cap' cannot be used")
    response = await bench.detect(png(), category="cap")
    assert refusal(response) == (503, "model_unavailable")
    assert response.headers["Retry-After"] == "1"


async def test_empty_body_is_422_and_shows_how(bench: Bench) -> None:
    response = await bench.detect(b"")
    assert refusal(response) == (422, "malformed")
    assert "curl --data-binary" in response.json()["detail"]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"category": "../etc"}, "category"),
        ({"map": "jpeg"}, "map"),
        ({"id": "x" * 257}, "id"),
        ({"category": ""}, "category"),
    ],
    ids=["category", "map", "id", "no category"],
)
async def test_bad_parameter_is_422_and_named(bench: Bench, query: dict[str, str], named: str) -> None:
    response = await bench.detect(png(), **query)
    assert refusal(response) == (422, "malformed")
    assert f"query.{named}" in response.json()["detail"]
    assert "../etc" not in response.text


async def test_missing_category_is_422(bench: Bench) -> None:
    response = await bench.client.post("/v1/detect", content=png())
    assert refusal(response) == (422, "malformed")
    assert "query.category: Field required" in response.json()["detail"]


async def test_busy_detector_is_503_with_retry_after(bench: Bench) -> None:
    bench.detector.failures = [DetectorOverloadedError("3 images wait and 2 may")]
    response = await bench.detect(png())
    assert refusal(response) == (503, "detector_overloaded")
    assert response.headers["Retry-After"] == "1"
    assert (await bench.detect(png())).status_code == 200


async def test_bug_is_500_without_its_text(bench: Bench) -> None:
    bench.detector.failures = [ValueError("/srv/secret.py said no")]
    response = await bench.detect(png())
    assert refusal(response) == (500, "internal")
    assert "secret" not in response.text


async def test_message_error_of_the_detector_keeps_its_reason(bench: Bench) -> None:
    bench.detector.failures = [MessageError(Reason.TOO_LARGE, "too much of it")]
    assert refusal(await bench.detect(png())) == (413, "too_large")


async def test_openapi_names_every_status_and_the_image_types(bench: Bench) -> None:
    document = (await bench.client.get("/openapi.json")).json()
    detect = document["paths"]["/v1/detect"]["post"]
    refused = {"401", "403", "404", "408", "413", "414", "415", "421", "422", "500", "503"}
    assert set(detect["responses"]) == {"200", *refused}
    for status, response in detect["responses"].items():
        (schema,) = (content["schema"]["$ref"] for content in response["content"].values())
        assert schema.endswith("/DetectionBody" if status == "200" else "/Problem")
    assert set(document["paths"]["/v1/images"]["post"]["responses"]) == {"202", "409", "429", *refused - {"404", "415"}}
    assert "image/png" in detect["requestBody"]["content"]
    assert {parameter["name"] for parameter in detect["parameters"]} == {"category", "id", "map"}
    assert set(document["paths"]["/readyz"]["get"]["responses"]) == {"200", "503"}
    assert "HTTPValidationError" not in json.dumps(document["paths"])


async def test_documentation_needs_no_other_host(bench: Bench) -> None:
    page = await bench.client.get("/docs")
    assert page.status_code == 200
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert linked
    for address in linked:
        assert address.startswith("/")
        assert (await bench.client.get(address)).status_code == 200
