"""`flawstream worker` with a decoder that never returns from an image of one size, as a bug in a library would.

Run it with `python -m helpers.hanging_worker worker ...`.
"""

import threading

from flawstream.imaging.decode import DecodedImage, decode_image
from flawstream.imaging.pixels import PixelForm
from flawstream_cli.commands import worker
from flawstream_cli.main import main
from helpers.fakes import FakeDetector
from schemas.settings import LimitSettings
from workers.consume import decode

HANGS_PX = 13


class FakeService(FakeDetector):
    """What the command needs of a detector's service."""

    alive = True

    async def start(self) -> None:
        """There is nothing to start."""

    async def stop(self) -> None:
        """There is nothing to stop."""

    def status(self) -> dict[str, object]:
        return {}


def _decode(data: bytes, form: PixelForm, limits: LimitSettings) -> DecodedImage:
    image = decode_image(data, form, limits)
    if HANGS_PX in image.original_shape:
        threading.Event().wait()
    return image


if __name__ == "__main__":
    decode.decode_image = _decode  # type: ignore[attr-defined]
    worker.wait_for_versions = lambda *_: None  # type: ignore[attr-defined]
    worker.open_detector = lambda *_: FakeService()  # type: ignore[assignment, attr-defined]
    main()
