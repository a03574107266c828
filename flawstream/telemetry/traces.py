"""The protocol that records the spans of an image. Knows no OpenTelemetry.

A producer's `traceparent` (W3C Trace Context) is copied to the result, with or without tracing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

Attributes = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Span:
    """A named time interval, in nanoseconds since 1970."""

    name: str
    start_ns: int
    end_ns: int


class Tracer(Protocol):
    """Records spans. Never waits for the collector, and never raises for an image."""

    def push(self, traceparent: str | None, attributes: Attributes) -> AbstractContextManager[str | None]:
        """Create a span for a push.

        Args:
            traceparent: The parent; None: the caller's current span, if any.
            attributes: Attributes of the image.

        Returns:
            A context for the push, which yields the traceparent to send with the image.
        """
        ...

    def image(
        self, traceparent: str | None, whole: Span, parts: Sequence[Span], attributes: Attributes, error: str | None
    ) -> None:
        """Create the spans of a completed image: one for the image, with one child per stage.

        Args:
            traceparent: The image's.
            whole: From arrival to completion.
            parts: The stages.
            attributes: Attributes of the image.
            error: Why it is a dead letter; None for a result.
        """
        ...


class NoTracer:
    """`Tracer` that records nothing."""

    @contextmanager
    def push(self, traceparent: str | None, attributes: Attributes) -> Iterator[str | None]:
        """Yield the traceparent unchanged."""
        del attributes
        yield traceparent

    def image(
        self, traceparent: str | None, whole: Span, parts: Sequence[Span], attributes: Attributes, error: str | None
    ) -> None:
        """Do nothing."""


NO_TRACER = NoTracer()
