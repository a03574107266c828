"""The HTTP API does what its own document says: schemathesis sends what the document allows and what it forbids."""

import io
from typing import Any

import schemathesis
from helpers.api_bench import Bench
from hypothesis import strategies as st
from PIL import Image
from pydantic import SecretStr

from schemas.settings import ApiSettings

Case = schemathesis.Case[Any]

HEADERS = {"Host": "localhost:8000"}
TOKEN = "a-token-of-this-test"  # noqa: S105 - of nothing


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, kind)
    return file.getvalue()


for name in ("bmp", "tiff"):  # schemathesis knows neither, and makes images of the other kinds itself
    schemathesis.openapi.media_type(f"image/{name}", st.just(encoded(name)))
    schemathesis.serializer.alias(f"image/{name}", "application/octet-stream")

without_tokens = schemathesis.openapi.from_asgi("/openapi.json", Bench().api, headers=HEADERS)
with_tokens = schemathesis.openapi.from_asgi(
    "/openapi.json", Bench(ApiSettings(tokens=(SecretStr(TOKEN),))).api, headers=HEADERS
)


@without_tokens.parametrize()
def test_api_without_tokens_does_what_its_document_says(case: Case) -> None:
    case.call_and_validate(headers=HEADERS)


@with_tokens.auth()
class Token(schemathesis.AuthProvider[str]):
    """Signs every call but those with which schemathesis finds out whether a token is asked for."""

    def get(self, _case: Case, _context: schemathesis.AuthContext) -> str:
        return TOKEN

    def set(self, case: Case, data: str, _context: schemathesis.AuthContext) -> None:
        case.headers["Authorization"] = f"Bearer {data}"


@with_tokens.parametrize()
def test_api_with_tokens_does_what_its_document_says(case: Case) -> None:
    case.call_and_validate(headers=HEADERS)
