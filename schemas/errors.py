"""Every error that flawstream raises on purpose: the class decides what happens next, the code goes on the wire.

Knows nothing of who raises or catches. An exception that is none of these is a bug.
"""

from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why an image is a dead letter: a closed set."""

    MALFORMED = "malformed"
    UNDECODABLE = "undecodable"
    UNKNOWN_CATEGORY = "unknown_category"
    TOO_LARGE = "too_large"
    FORBIDDEN_REFERENCE = "forbidden_reference"
    UNAVAILABLE_REFERENCE = "unavailable_reference"
    POISON = "poison"


def one_line(text: object, most: int = 300) -> str:
    """Write an error of a library, or any text, on one line of at most so many characters."""
    return " ".join(str(text).split())[:most]


def escaped(text: object) -> str:
    r"""Write the bytes of a file name that are not UTF-8 as `\udcfc`, so that every encoder and printer takes the text.

    Args:
        text: Any text; Python reads such bytes as surrogates (`os.fsdecode`).
    """
    return str(text).encode(errors="backslashreplace").decode()


class FlawstreamError(Exception):
    """The root of all errors raised on purpose.

    The text says what happened with the value, why, and what to do. File names in it are escaped.
    """

    code: ClassVar[str] = "error"

    def __init__(self, *args: object) -> None:
        super().__init__(*(escaped(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(FlawstreamError):
    """Cannot start: a setting or an argument is wrong."""

    code = "config"


class MessageError(FlawstreamError):
    """The input can never succeed: it is refused; an entry on the stream becomes a dead letter.

    Attributes:
        reason: The code that goes on the wire.
    """

    code = "message"

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[type["MessageError"], tuple[Reason, str]]:
        """Keep the reason when the error crosses a process."""
        return type(self), (self.reason, str(self))


class TransientError(FlawstreamError):
    """May succeed later: the entry stays pending and is retried."""

    code = "transient"


class StreamUnavailableError(TransientError):
    """The stream server does not answer."""

    code = "stream_unavailable"


class StorageUnavailableError(TransientError):
    """The registry's storage cannot be read or written, or looks empty, as a folder that is not mounted does."""

    code = "storage_unavailable"


class SourceUnavailableError(TransientError):
    """The folder or camera that images are captured from does not answer."""

    code = "source_unavailable"


class BacklogFullError(TransientError):
    """The backlog is full: the producer is refused and nothing was written."""

    code = "backlog_full"


class IdConflictError(FlawstreamError):
    """An image has the id of another one that was pushed a short time ago: it is refused and nothing was written."""

    code = "id_conflict"


class DetectorOverloadedError(TransientError):
    """The detector's queue is full."""

    code = "detector_overloaded"


class EverythingFailsError(TransientError):
    """No image can be judged, or no outcome written, whatever the image: its delivery does not count."""

    code = "everything_fails"


class ClusterLostError(TransientError):
    """The head of the Ray cluster does not answer any more."""

    code = "cluster_lost"


class DeviceLostError(TransientError):
    """A GPU failed in a way that only a new process recovers from; the images are retried by another."""

    code = "device_lost"


class ModelUnavailableError(TransientError):
    """The current version of a category cannot be used now."""

    code = "model_unavailable"


class DetectorDiedError(FlawstreamError):
    """The process that judged a batch died, perhaps because of an image in it."""

    code = "detector_died"


class StageTimeoutError(FlawstreamError):
    """Decoding, the detector, building results or a folder hangs: only the end of the process ends that."""

    code = "stage_timeout"


class RegistryError(FlawstreamError):
    """A model version is missing, damaged, or newer than this program reads."""

    code = "registry"


class UnknownCategoryError(RegistryError):
    """A category has no current version."""

    code = "unknown_category"


class WeightsError(FlawstreamError):
    """Backbone weights cannot be found or loaded."""

    code = "weights"


class DatasetError(FlawstreamError):
    """A data set folder cannot be trained on or evaluated."""

    code = "dataset"


class ShapeError(FlawstreamError, ValueError):
    """An array does not have the shape that was promised: our bug."""

    code = "shape"
