"""A detector of Ray Serve whose engine never returns from a white picture, as a bug in a library would."""

import threading
from collections.abc import Sequence

from flawstream.engines.choose import make_engine
from flawstream.engines.protocol import Engine, HeadRows, ScoredBatch
from flawstream.imaging.pixels import Pixels
from schemas.settings import Settings
from serving import engines
from serving.deployments import DetectorDeployment

HANGS = 255
"""The grey value of such a picture."""


class HangingDetectorDeployment(DetectorDeployment):
    """A detector replica with such an engine."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        engines.make_engine = _make_hanging  # type: ignore[assignment, attr-defined]
        await super().__init__(settings)


def _make_hanging(*arguments: object) -> Engine:
    engine: Engine = make_engine(*arguments)  # type: ignore[arg-type]
    detect = engine.detect

    def detect_or_hang(images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        if (images == HANGS).all(axis=(1, 2, 3)).any():
            threading.Event().wait()
        return detect(images, heads)

    engine.detect = detect_or_hang  # type: ignore[method-assign]
    return engine
