"""References as text: what the allow-list covers is what is fetched, and every trick around it is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.references import MAX_REFERENCE_CHARS, Reference, parse_allowed, parse_reference, shorten
from schemas.settings import ReferenceSettings
from workers.references.http import is_public_or_private

ALLOWED = tuple(
    map(
        parse_allowed,
        (
            "key:frames:",
            "s3://photos/line-1/",
            "https://cams.example/images/",
            "http://cams.example:8080/",
            "http://10.1.2.3/",
            "http://[fd00::5]/",
            "http://localhost/",
            "https://bücher.example/a/",
        ),
    )
)


def is_allowed(text: str) -> bool:
    try:
        reference = parse_reference(text)
    except ValueError:
        return False
    return any(reference.is_below(allowed) for allowed in ALLOWED)


@pytest.mark.parametrize(
    "text",
    [
        "key:frames:42",
        "KEY:frames:42",
        "key:frames:../7",
        "s3://photos/line-1/a b/ü.png",
        "https://cams.example/images/42.png",
        "HTTPS://CAMS.Example./images/42.png",
        "https://cams.example:443/images/a/b.png?X-Amz-Signature=abc%2F",
        "http://cams.example:8080/42",
        "http://10.1.2.3:80/42",
        "http://[FD00:0::5]/42",
        "http://localhost/42",
        "https://xn--bcher-kva.example/a/1",
        "https://BÜCHER.example/a/1",
        "https://cams.example/images/%C3%BC.png",
        "https://cams.example/images/a..b.png",
    ],
)
def test_what_lies_below_an_allowed_place_is_allowed(text: str) -> None:
    assert is_allowed(text)


@pytest.mark.parametrize(
    "text",
    [
        # other schemes, and no scheme
        "",
        "key",
        "42.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "file://cams.example/images/x",
        "ftp://cams.example/images/x",
        "gopher://cams.example:8080/_GET",
        "data:image/png;base64,AAAA",
        "unix:///var/run/docker.sock",
        "http+unix://%2Fvar%2Frun%2Fdocker.sock/images",
        "local://x",
        "simplecache::https://cams.example/images/x",
        "https:cams.example/images/x",
        "https:/cams.example/images/x",
        "https:///images/x",
        " https://cams.example/images/x",
        "https://cams.example/images/x\n",
        # other keys and buckets
        "key:flawstream:images",
        "key:frames:",
        "key:Frames:42",
        "s3://photos/line-2/a.png",
        "s3://photos/line-1/",
        "s3://photos/line-1",
        "s3://photos-of-others/line-1/a.png",
        "s3://Photos/line-1/a.png",
        "s3:/photos/line-1/a.png",
        "s3://photos/line-1/../line-2/a.png",
        "s3://photos/line-1/./a.png",
        "s3://photos/line-1//a.png",
        "s3://photos//line-1/a.png",
        "s3://photos/line-1/%2e%2e/a.png",
        "s3://photos/line-1/a.png?versionId=1",
        "s3://photos/line-1/a.png#x",
        "s3://photos/line-1\\..\\a.png",
        "s3://arn:aws:s3:eu-central-1:1:accesspoint/photos/line-1/a",
        # other hosts and ports
        "https://cams.example.evil.example/images/x",
        "https://evilcams.example/images/x",
        "https://evil.example/cams.example/images/x",
        "https://cams.example@evil.example/images/x",
        "https://user:pass@cams.example/images/x",
        "https://@cams.example/images/x",
        "https://evil.example#@cams.example/images/x",
        "https://evil.example?@cams.example/images/x",
        "https://cams.example\\@evil.example/images/x",
        "https://cams.example\t/images/x",
        "https://cams.example:80/images/x",
        "https://cams.example:444/images/x",
        "https://cams.example:99999/images/x",
        "https://cams.example:4٤3/images/x",
        "https://cams.example../images/x",
        "https://.cams.example/images/x",
        "https://cams%2eexample/images/x",
        "http://cams.example/images/x",
        "https://cams.example:8080/x",
        "https://cаms.example/images/x",  # noqa: RUF001 - a Cyrillic letter
        "https://bücher.example.evil/a/1",
        # other paths
        "https://cams.example/images",
        "https://cams.example/images/",
        "https://cams.example/images-of-others/x",
        "https://cams.example/Images/x",
        "https://cams.example/images/../secrets/x",
        "https://cams.example/images/./x",
        "https://cams.example/images/..",
        "https://cams.example/images/..;/secrets",
        "https://cams.example/images/%2e%2e/secrets",
        "https://cams.example/images/%2E%2e%2Fsecrets",
        "https://cams.example/images/.%2e/secrets",
        "https://cams.example/images/%252e%252e/secrets",
        "https://cams.example/images/..%5csecrets",
        "https://cams.example/images/..\\secrets",
        "https://cams.example/images/%c0%ae%c0%ae/secrets",
        "https://cams.example/images//x",
        "https://cams.example//images/x",
        "https://cams.example/images/x%00.png",
        "https://cams.example/images/x%0d%0aHost:evil",
        "https://cams.example/images/x%zz",
        "https://cams.example/images/x#f",
        "https://cams.example/images/a b",
        "https://cams.example/images/\u202egnp.x",
        "https://cams.example/images/?a b",
        # addresses written in other ways
        "http://2130706433/x",
        "http://0x7f000001/x",
        "http://0x7f.1/x",
        "http://0177.0.0.1/x",
        "http://127.1/x",
        "http://127.0.0.1/x",
        "http://0/x",
        "http://167838211/42",  # 10.1.2.3
        "http://10.1.515/42",
        "http://10.1.2.03/42",
        "http://012.1.2.3/42",
        "http://10.1.2.3.nip.io/42",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/x",
        "http://[::1]/x",
        "http://[::]/x",
        "http://[fe80::1%25eth0]/x",
        "http://[fd00::5%251]/42",
        "http://[fd00::5/42",
        "http://fd00::5/42",
        "http://１0.1.2.4/42",  # noqa: RUF001 - a full-width digit
        "http://localhost.evil.example/42",
        "http://foo.localhost/42",
    ],
)
def test_whatever_leads_elsewhere_is_not_allowed(text: str) -> None:
    assert not is_allowed(text)


@pytest.mark.parametrize("text", ["http://[::ffff:10.1.2.3]/42", "http://[::ffff:a01:203]/42", "http://１0。1.2.3/42"])  # noqa: RUF001
def test_one_address_in_other_letters_is_the_same_address_and_connected_to_as_such(text: str) -> None:
    assert parse_reference(text) == Reference("http", "10.1.2.3", 80, "/42")


def test_reference_is_refused_one_character_past_the_limit() -> None:
    fitting = "key:frames:" + "x" * (MAX_REFERENCE_CHARS - len("key:frames:"))
    assert is_allowed(fitting)
    assert not is_allowed(fitting + "x")


@given(st.text(max_size=60) | st.from_regex(r"https://cams\.example[:@/.?#%\\a-z0-9]{0,30}", fullmatch=True))
def test_no_text_raises_another_error_and_what_is_allowed_reads_the_same_in_its_shown_form(text: str) -> None:
    try:
        reference = parse_reference(text)
    except ValueError:
        return
    assert parse_reference(str(reference)).path == reference.path
    assert parse_reference(str(reference)).host == reference.host
    if any(reference.is_below(allowed) for allowed in ALLOWED) and reference.scheme == "https":
        assert reference.host in ("cams.example", "xn--bcher-kva.example")


def test_query_is_never_shown() -> None:
    reference = parse_reference("https://cams.example/images/42?signature=secret")
    assert reference.query == "signature=secret"
    assert "secret" not in f"{reference} {reference!r}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("images/", "starts with none of"),
        ("file:///srv/images/", "starts with none of"),
        ("key:", "every key"),
        ("s3://bucket", "must end with a slash"),
        ("s3://bucket/folder", "must end with a slash"),
        ("s3://B/", "bucket"),
        ("https://host", "not of the form"),
        ("https://host/images", "must end with a slash"),
        ("https://host/images/?token=x/", "query"),
        ("https://user:password@host/", "user name"),
        ("https://host/../", "segment"),
        ("https://2130706433/", "number"),
    ],
)
def test_bad_entry_of_the_allow_list_is_refused_at_the_start_and_says_why(text: str, words: str) -> None:
    with pytest.raises(ValidationError, match=f"entry 2 of the list cannot be allowed.*{words}") as caught:
        ReferenceSettings(allow=("key:frames:", text))
    assert "password@" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "172.16.0.1", "192.168.1.1", "8.8.8.8", "fd00::5", "2001:4860:4860::8888", "::ffff:8.8.8.8"]
)
def test_name_may_lead_to_public_and_private_addresses(address: str) -> None:
    assert is_public_or_private(address, localhost=False)
    assert not is_public_or_private(address, localhost=True)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_localhost_alone_may_lead_to_this_machine(address: str) -> None:
    assert is_public_or_private(address, localhost=True)
    assert not is_public_or_private(address, localhost=False)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.1.1",
        "fe80::1",
        "fe80::1%eth0",
        "224.0.0.1",
        "ff02::1",
        "0.0.0.0",  # noqa: S104 - an address to refuse
        "0.1.2.3",
        "::",
        "255.255.255.255",
        "240.0.0.1",
        "::ffff:169.254.169.254",
        "::169.254.169.254",
        "64:ff9b::a9fe:a9fe",  # NAT64 of 169.254.169.254
        "64:ff9b::7f00:1",
        "2002:a9fe:a9fe::1",  # 6to4 of the same
        "100.100.100.200",
        "192.0.0.192",
        "fd00:42::42",
        "168.63.129.16",
        "fd00:ec2::254",
        "fd20:ce::254",
        "no address",
        "",
    ],
)
@pytest.mark.parametrize("localhost", [False, True])
def test_no_name_may_lead_to_metadata_multicast_or_nowhere(address: str, localhost: bool) -> None:  # noqa: FBT001
    assert not is_public_or_private(address, localhost=localhost)


@pytest.mark.parametrize(
    ("text", "shown"), [("a\nb\x1b", "a?b?"), ("x" * 200, "x" * 200), ("x" * 201, "x" * 200 + "...")]
)
def test_what_came_from_outside_is_shown_short_and_printable(text: str, shown: str) -> None:
    assert shorten(text) == shown
