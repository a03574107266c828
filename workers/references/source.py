"""What a place that holds images is to the fetcher, and the ways in which it may fail.

A place raises `MessageError` where another try would fail as well, `PassingError` where it might not.
"""

from typing import Protocol

from schemas.errors import MessageError, Reason
from schemas.references import Reference


class PassingError(Exception):
    """A try failed and the next one may succeed. The text goes into a log: it must not hold a query."""


class Source(Protocol):
    """Holds images of one scheme. What it is asked for is on the allow-list."""

    async def read(self, reference: Reference) -> bytes:
        """Read an image, at most `limits.max_image_bytes` of it.

        Raises:
            MessageError: `too_large`, `unavailable_reference`, `forbidden_reference`.
            PassingError: It may succeed later.
            StreamUnavailableError: The stream server does not answer; nothing is said of the reference.
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


def forbidden(reference: Reference, why: str) -> MessageError:
    """Say that a reference leads where it must not."""
    return MessageError(
        Reason.FORBIDDEN_REFERENCE,
        f"{reference} is not fetched: {why}; put the bytes in field image, or refer to where references.allow says",
    )


def unavailable(reference: Reference, why: str) -> MessageError:
    """Say that a reference is allowed and leads to no image."""
    return MessageError(
        Reason.UNAVAILABLE_REFERENCE, f"{reference} cannot be had: {why}; push it again once the image is there"
    )


def too_large(reference: Reference, size_bytes: int | None, max_bytes: int) -> MessageError:
    """Say that an image is larger than any may be; `size_bytes` is absent where it was not read to its end."""
    size = f"more than {max_bytes:,}" if size_bytes is None else f"{size_bytes:,}"
    return MessageError(
        Reason.TOO_LARGE,
        f"{reference} has {size} bytes and {max_bytes:,} are allowed; "
        "send a smaller image or raise limits.max_image_bytes",
    )
