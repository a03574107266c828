"""The fuzz's entries: repeatable, as many as asked for, and none of them good by accident."""

from collections import Counter

import pytest
from soak.fuzz_corpus import corpus

from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError, Reason
from schemas.settings import LimitSettings
from schemas.wire import parse_image

WEB = "localhost:8123"
COUNT = 300


def test_same_seed_makes_the_same_entries_and_another_seed_others() -> None:
    assert list(corpus(1, 50, WEB)) == list(corpus(1, 50, WEB))
    assert list(corpus(1, 50, WEB)) != list(corpus(2, 50, WEB))


def test_so_many_entries_as_asked_for_are_sure_to_be_refused_and_each_id_is_another() -> None:
    entries = list(corpus(0, COUNT, WEB))
    assert sum(not entry.may_pass for entry in entries) == COUNT
    assert all(entry.reasons for entry in entries if not entry.may_pass)
    named = Counter(entry.fields.get(b"id") for entry in entries)
    assert all(count == 1 for count in named.values())
    assert {reason for entry in entries for reason in entry.reasons} == set(Reason) - {Reason.POISON}


def test_good_entries_can_be_judged() -> None:
    good = [entry for entry in corpus(0, COUNT, WEB) if not entry.reasons]
    assert good
    for entry in good:
        message = parse_image("1-0", entry.fields, LimitSettings())
        assert decode_image(message.image or b"", PixelForm(64), LimitSettings()).pixels.std() > 1


def test_entries_with_a_wrong_field_are_refused_for_that_reason() -> None:
    checked = 0
    for entry in corpus(0, COUNT, WEB):
        if entry.reasons == {Reason.MALFORMED}:
            with pytest.raises(MessageError) as caught:
                parse_image("1-0", entry.fields, LimitSettings())
            assert caught.value.reason is Reason.MALFORMED, entry.kind
            checked += 1
    assert checked
