"""The way of one image as spans: the protocol by which they are told. Knows no OpenTelemetry.

A producer's `traceparent` (W3C Trace Context) goes through to the result as it came, whether or not anybody traces.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

Attributes = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Stage:
    """What took time. Nanoseconds since 1970."""

    name: str
    start_ns: int
    end_ns: int


class Tracer(Protocol):
    """Tells spans to whoever collects them. It never waits for the collector, and never fails an image."""

    def push(self, traceparent: str | None, attributes: Attributes) -> AbstractContextManager[str | None]:
        """Make a span of a push.

        Args:
            traceparent: Of what the push is a part; None: of the span that the caller is in, or of nothing.
            attributes: What is known of the image.

        Returns:
            A context that lasts as long as the push and gives the traceparent to send along.
        """
        ...

    def image(
        self, traceparent: str | None, whole: Stage, parts: Sequence[Stage], attributes: Attributes, error: str | None
    ) -> None:
        """Make the spans of an image that has ended: one of the whole, in it one of each part.

        Args:
            traceparent: As it came with the image.
            whole: From its arrival to its end.
            parts: What was done meanwhile.
            attributes: What is known of the image.
            error: Why it is a dead letter; None where it is none.
        """
        ...


class NoTracer:
    """`Tracer` where nobody collects."""

    @contextmanager
    def push(self, traceparent: str | None, attributes: Attributes) -> Iterator[str | None]:
        """Send the traceparent along as it came."""
        del attributes
        yield traceparent

    def image(
        self, traceparent: str | None, whole: Stage, parts: Sequence[Stage], attributes: Attributes, error: str | None
    ) -> None:
        """Do nothing."""


NO_TRACER = NoTracer()
