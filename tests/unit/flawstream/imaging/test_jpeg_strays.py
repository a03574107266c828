"""Stray bytes before a marker of a JPEG: the picture is judged, and what is cut or damaged beside them is refused."""

import io
import re
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings

FORM = PixelForm(32)
LIMITS = LimitSettings()
KINDS: list[dict[str, Any]] = [
    {},
    {"subsampling": 0},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 1},
    {"restart_marker_blocks": 7, "subsampling": 1},
    {"progressive": True},
]
STRAY = bytes.fromhex("12 34 ff 00 56 78 9a bc de f1 00 00")
MARKER = re.compile(rb"\xff[^\x00\xff]")


def encode(mode: str = "RGB", width: int = 90, height: int = 70, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.blur(noise, (5, 5))).convert(mode).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def pixels(data: bytes, form: PixelForm = FORM) -> list[Any]:
    found: list[Any] = decode_image(data, form, LIMITS).pixels.tolist()
    return found


def refusal(data: bytes) -> str:
    with pytest.raises(MessageError) as caught:
        decode_image(data, FORM, LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE
    return str(caught.value)


def scan_start(data: bytes) -> int:
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def restarts(data: bytes) -> list[int]:
    return [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", data) if found.start() > scan_start(data)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("count", [1, 3, 4, 8, 12, 4096])
def test_stray_bytes_before_the_end_change_nothing(mode: str, options: dict[str, Any], count: int) -> None:
    data = encode(mode, **options)
    stray = (STRAY * 400)[:count]
    assert pixels(data[:-2] + stray + data[-2:]) == pixels(data)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [kind for kind in KINDS if any("restart" in name for name in kind)])
@pytest.mark.parametrize("form", [FORM, PixelForm(32, "antialias")])
def test_stray_bytes_before_restart_markers_change_nothing(mode: str, options: dict[str, Any], form: PixelForm) -> None:
    data = encode(mode, **options)
    places = restarts(data)
    assert len(places) > 3
    first = data[: places[1]] + STRAY + data[places[1] :]
    assert pixels(first, form) == pixels(data, form)
    pieces = [data[start:end] for start, end in zip([0, *places], [*places, len(data) - 2], strict=True)]
    assert pixels(STRAY.join(pieces) + STRAY + data[-2:], form) == pixels(data, form)


@pytest.mark.parametrize("options", KINDS)
def test_stray_bytes_between_segments_change_nothing(options: dict[str, Any]) -> None:
    data = encode(**options)
    position, places = 2, list[int]()
    while data[position + 1] != 0xDA:
        places.append(position)
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    places = [*places[1:], position]  # one right behind the start makes it something else to every decoder
    for place in places:
        assert pixels(data[:place] + STRAY + data[place:]) == pixels(data)
    everywhere = STRAY.join(data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True))
    assert pixels(everywhere[:-2] + STRAY + everywhere[-2:]) == pixels(data)


def test_restart_interval_wider_than_a_picture_can_be_is_taken() -> None:
    data = encode(
        width=8200, height=260, restart_marker_rows=2, subsampling=0
    )  # 2 x 1025 units of 8 pixels: rows of them
    places = restarts(data)
    assert pixels(data[: places[0]] + STRAY + data[places[0] :]) == pixels(data)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_premature_end_stays_refused_beside_stray_bytes(options: dict[str, Any], share: float) -> None:
    data = encode(**options)
    start = scan_start(data)
    cut = start + int(share * (len(data) - 2 - start))
    places = [place for place in restarts(data) if place < cut - 8]
    strayed = data[: places[0]] + STRAY + data[places[0] : cut] if places else data[:cut]
    assert "damaged" in refusal(strayed)  # no end marker
    assert "damaged" in refusal(strayed + STRAY[-4:])
    assert "damaged" in refusal(strayed + data[-2:])


@pytest.mark.parametrize("options", [kind for kind in KINDS if any("restart" in name for name in kind)])
def test_restart_interval_that_is_cut_missing_or_out_of_order_is_refused_beside_stray_bytes(
    options: dict[str, Any],
) -> None:
    data = encode(**options)
    places = restarts(data)
    strayed = data[: places[0]] + STRAY + data[places[0] :]
    second, third = places[1] + len(STRAY), places[2] + len(STRAY)
    assert "damaged" in refusal(strayed[: second + 2] + strayed[second + 4 : third][:1] + strayed[third:])
    assert "is where 0xd1 must be" in refusal(strayed[:second] + strayed[third:])
    assert "is where 0xd1 must be" in refusal(strayed[:second] + b"\xff\xd3" + strayed[second + 2 :])


def test_more_restart_intervals_than_are_worth_a_look_are_refused_beside_stray_bytes_alone() -> None:
    image = Image.new("L", (1024, 520))
    file = io.BytesIO()
    image.save(file, "JPEG", restart_marker_blocks=1)
    data = file.getvalue()
    assert pixels(data) == [[[0, 0, 0]] * 32] * 32
    place = restarts(data)[0]
    assert "more than 4,096 restart intervals" in refusal(data[:place] + STRAY + data[place:])


def test_four_colours_with_stray_bytes_are_refused() -> None:
    """Their decoder gives no pixels beside a warning, and no camera writes them."""
    data = encode("CMYK")
    assert "damaged" in refusal(data[:-2] + STRAY + data[-2:])


def test_motion_jpeg_without_huffman_tables_may_have_stray_bytes() -> None:
    data = encode(restart_marker_rows=1)
    kept, position = data[:2], 2
    while data[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        kept += data[position:end] if data[position + 1] != 0xC4 else b""
        position = end
    tableless = kept + data[position:]
    place = restarts(tableless)[2]
    assert pixels(tableless[:place] + STRAY + tableless[place:-2] + STRAY + tableless[-2:]) == pixels(data)
