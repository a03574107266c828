"""How a dead letter is made."""

import pytest
from helpers.fakes import ARRIVED, entry_id, image_entry

from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings
from schemas.wire import MAX_FIELDS, dead_letter_fields, parse_dead_letter, parse_image
from workers.outcomes.dead_letter import make_dead_letter
from workers.ports import Entry, Refusal


def test_a_dead_letter_keeps_the_original_fields_and_says_why() -> None:
    entry = image_entry(1, image=b"\xff\xd8 broken", deliveries=3)
    letter = make_dead_letter(entry, MessageError(Reason.UNDECODABLE, "the JPEG is damaged"), ARRIVED)
    assert letter.fields == entry.fields
    assert (letter.reason, letter.detail) == (Reason.UNDECODABLE, "the JPEG is damaged")
    assert (letter.deliveries, letter.failed_at, letter.entry_id) == (3, ARRIVED, entry_id(1))


def test_a_refusal_of_the_detector_becomes_a_dead_letter() -> None:
    letter = make_dead_letter(image_entry(1), Refusal(Reason.UNKNOWN_CATEGORY, "no model for bottle"), ARRIVED)
    assert (letter.reason, letter.detail) == (Reason.UNKNOWN_CATEGORY, "no model for bottle")


def test_a_dead_letter_survives_the_wire() -> None:
    letter = make_dead_letter(image_entry(1), Refusal(Reason.POISON, "given out 5 times"), ARRIVED)
    assert parse_dead_letter(dead_letter_fields(letter)) == letter


def test_an_entry_with_too_many_fields_is_refused_and_its_dead_letter_keeps_the_image() -> None:
    many = {f"field-{k}".encode(): b"x" for k in range(5000)}
    entry = Entry(entry_id(1), {**many, b"category": b"bottle", b"image": b"pixels"})
    with pytest.raises(MessageError) as raised:
        parse_image(entry.entry_id, entry.fields, LimitSettings(max_fields_bytes=1 << 20))
    letter = make_dead_letter(entry, raised.value, ARRIVED)
    assert letter.reason is Reason.TOO_LARGE
    assert len(letter.fields) == MAX_FIELDS
    assert letter.fields[b"image"] == b"pixels"
    assert letter.fields[b"category"] == b"bottle"
    assert "4,002 of the fields are left out" in letter.detail
