"""An engine that raises for every image while a file exists, in detectors of Ray Serve and in `flawstream worker`.

As a program it is `flawstream worker` with such an engine: `python -m soak.breakable_engine worker ...`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from flawstream.engines.choose import make_engine
from flawstream.engines.protocol import Engine, HeadRows, ScoredBatch
from flawstream.imaging.pixels import Pixels
from flawstream_cli.main import main
from schemas.settings import Settings
from serving import engines
from serving.deployments import DetectorDeployment

SWITCH = "SOAK_ENGINE_FAILS"
"""Environment variable with the path of the file; Ray's processes inherit it."""


class BreakableDetectorDeployment(DetectorDeployment):
    """A detector replica with such an engine."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        make_engines_breakable()
        await super().__init__(settings)


def make_engines_breakable() -> None:
    """Have every engine that this process opens from now on check for the file."""
    engines.make_engine = _make_breakable  # type: ignore[assignment, attr-defined]


def _make_breakable(*arguments: object) -> Engine:
    engine: Engine = make_engine(*arguments)  # type: ignore[arg-type]
    detect, switch = engine.detect, Path(os.environ[SWITCH])

    def detect_or_fail(images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        if switch.exists():
            raise RuntimeError("the engine fails for every image")
        return detect(images, heads)

    engine.detect = detect_or_fail  # type: ignore[method-assign]
    return engine


if __name__ == "__main__":
    make_engines_breakable()
    main()
