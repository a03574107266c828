"""The two resizes: `antialias` is torchvision's, whatever the file and its size; `area` is held in test_images.py."""

import io

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional

from flawstream.fastflow.backbone import Backbone
from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from flawstream.imaging.resize import resize
from schemas.manifest import BackboneSpec
from schemas.settings import LimitSettings, ModelSettings, Resize

SIDE = 96
FORM = PixelForm(SIDE, "antialias")
LEVELS = 1e-3
"""Float32 sums of many pixels differ by less; one rounding to whole levels differs by up to 0.5."""
FILES = [("JPEG", {"quality": 90}), ("JPEG", {"quality": 90, "subsampling": 0}), ("PNG", {})]


def texture(height: int, width: int) -> NDArray[np.uint8]:
    """Make a picture with fine and coarse structure in every channel."""
    random = np.random.default_rng(height * width)
    coarse = cv2.resize(random.uniform(0, 255, (8, 8, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    made: NDArray[np.uint8] = np.clip(coarse + random.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)
    return made


def encode(pixels: NDArray[np.uint8], image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def torchvision_s(data: bytes) -> NDArray[np.float32]:
    """Read and resize as anomalib does: Pillow, then torchvision on a float tensor; (S, S, 3), grey levels."""
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float()
    resized = functional.resize(tensor, [SIDE, SIDE], antialias=True)
    return np.asarray(resized.permute(1, 2, 0), np.float32)


@pytest.mark.parametrize(("image_format", "options"), FILES, ids=["JPEG 4:2:0", "JPEG 4:4:4", "PNG"])
@pytest.mark.parametrize(
    ("height", "width"),
    [(500, 700), (1501, 97), (96, 96), (60, 40), (64, 300), (3, 20), (120, 1900)],  # the last: several blocks
)
def test_antialias_is_torchvision_s(height: int, width: int, image_format: str, options: dict[str, object]) -> None:
    data = encode(texture(height, width), image_format, **options)
    image = decode_image(data, FORM, LimitSettings(max_aspect=100))
    assert image.original_shape == (height, width)
    assert image.pixels.shape == FORM.shape
    assert image.pixels.dtype == FORM.dtype
    assert image.pixels.flags.c_contiguous
    assert np.abs(image.pixels - torchvision_s(data)).max() <= LEVELS


def test_grey_stays_grey() -> None:
    grey = Image.fromarray(texture(200, 300)).convert("L")
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    pixels = decode_image(buffer.getvalue(), FORM, LimitSettings()).pixels
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 1])
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])


def test_turned_camera_gives_an_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = texture(200, 300)
    image = decode_image(encode(lying, "JPEG", exif=exif), FORM, LimitSettings())
    plain = decode_image(encode(lying, "JPEG"), FORM, LimitSettings())
    assert image.original_shape == (300, 200)
    np.testing.assert_array_equal(image.pixels, np.rot90(plain.pixels, -1))


def test_form_is_the_version_s() -> None:
    settings = ModelSettings(input_size=SIDE, resize="antialias")
    spec = Backbone(settings).spec
    assert PixelForm.of(spec) == PixelForm.of(settings) == FORM
    assert PixelForm.of(ModelSettings()) == PixelForm(256, "area")


def test_manifest_of_before_has_the_resize_of_before() -> None:
    spec = Backbone(ModelSettings(input_size=SIDE)).spec
    assert BackboneSpec.model_validate(spec.model_dump(exclude={"resize"})) == spec
    assert spec.resize == "area"


@pytest.mark.parametrize("resize_by", ["area", "antialias"])
@pytest.mark.parametrize("shape", [(48, 80), (300, 200), (97, 31), (64, 64), (513, 1027), (20, 20)])
def test_grey_gives_the_same_as_three_equal_channels(shape: tuple[int, int], resize_by: Resize) -> None:
    grey = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    form = PixelForm(32, resize_by)
    assert np.array_equal(resize(grey, form), resize(np.dstack([grey] * 3), form))
