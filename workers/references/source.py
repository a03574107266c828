"""The protocol of a source of images, and its errors.

A source raises `MessageError` where another try would fail too, `RetryableError` where it may succeed.
"""

from typing import Protocol

from schemas.errors import MessageError, Reason
from schemas.references import Reference


class RetryableError(Exception):
    """A try failed and the next one may succeed. The text is logged: it must not have a query."""


class Source(Protocol):
    """Reads images of one scheme. The caller has checked the allow-list."""

    async def read(self, reference: Reference) -> bytes:
        """Read an image, at most `limits.max_image_bytes` of it.

        Raises:
            MessageError: `too_large`, `unavailable_reference`, `forbidden_reference`.
            RetryableError: The next try may succeed.
            StreamUnavailableError: The stream server does not answer; the reference may be good.
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


def forbidden(reference: Reference, why: str) -> MessageError:
    """Make the error of a reference that must not be fetched."""
    return MessageError(
        Reason.FORBIDDEN_REFERENCE,
        f"{reference} is not fetched: {why}; put the bytes in field image, "
        "or use a reference that references.allow covers",
    )


def unavailable(reference: Reference, why: str) -> MessageError:
    """Make the error of an allowed reference that leads to no image."""
    return MessageError(
        Reason.UNAVAILABLE_REFERENCE, f"{reference} cannot be fetched: {why}; push it again once the image is there"
    )


def too_large(reference: Reference, size_bytes: int | None, max_bytes: int) -> MessageError:
    """Make the error of an image that is too large; `size_bytes` is None where it was not read to its end."""
    size = f"more than {max_bytes:,}" if size_bytes is None else f"{size_bytes:,}"
    return MessageError(
        Reason.TOO_LARGE,
        f"{reference} has {size} bytes and {max_bytes:,} are allowed; "
        "send a smaller image or raise limits.max_image_bytes",
    )
