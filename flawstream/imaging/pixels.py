"""Size, filter, depth and dtype of the pixels that a model sees, the same in training, calibration and serving.

Shape legend: B images, S side of an image in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from schemas.manifest import BackboneSpec
from schemas.settings import BitDepth, ModelSettings, Resize

Pixels = NDArray[np.uint8 | np.float32]
"""(S, S, 3) or (B, S, S, 3) RGB, 0 to 255, of the dtype of a `PixelForm`."""

Depths = Sequence[BitDepth | None]
"""By how many bits each of B images was read, if its file has 16; None if it has 8."""


@dataclass(frozen=True, slots=True)
class PixelForm:
    """How an image becomes the square of pixels that a model sees.

    Attributes:
        side_px: Side of the square.
        resize: The filter: `flawstream.imaging.resize`.
        bits: How many bits are read of files with 16: `flawstream.imaging.levels`.
    """

    side_px: int
    resize: Resize = "area"
    bits: BitDepth = 16

    @classmethod
    def of(cls, model: BackboneSpec | ModelSettings, bits: BitDepth = 16) -> Self:
        """Return the form of a model version, or of a model to be trained."""
        return cls(model.input_size, model.resize, bits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image."""
        return self.side_px, self.side_px, 3

    @property
    def dtype(self) -> Literal["uint8", "float32"]:
        """Dtype of the pixels: `antialias` is not rounded to uint8, which would change maps by up to 0.01."""
        return "float32" if self.resize == "antialias" else "uint8"
