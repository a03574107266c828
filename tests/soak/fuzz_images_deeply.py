"""A fuzz target for atheris, Google's coverage-guided fuzzer: any bytes either are an image, or are refused.

    make fuzz-images                                            ten minutes
    make fuzz-images ARGS='-max_total_time=86400 -jobs=8'       libFuzzer's options

It starts from small photographs and what the hostile corpus of `soak.fuzz` has, and keeps what reaches new lines in
`build/fuzz-images`, from which the next run continues. It stops at the first file that raises anything else than
`MessageError`, takes longer than 2 s or more than 1 GB, and writes that file there.
"""

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flawstream.imaging"]):
    from flawstream.imaging.decode import decode_image
    from flawstream.imaging.pixels import PixelForm

from schemas.errors import MessageError
from schemas.settings import LimitSettings
from soak.fuzz_images import FORMATS, bomb, photograph, spoil

_FOLDER = Path(__file__).parents[2] / "build/fuzz-images"
_SEEDS = 200
_FORM = PixelForm(64, "area")
_LIMITS = LimitSettings()
_LIBFUZZER = ("-max_total_time=600", "-timeout=2", "-rss_limit_mb=1024", "-max_len=262144")


def decode_or_refuse(data: bytes) -> None:
    """Decode, as a worker does."""
    try:
        image = decode_image(data, _FORM, _LIMITS)
    except MessageError:
        return
    if image.pixels.shape != (64, 64, 3):
        raise AssertionError(f"an image of the shape {image.pixels.shape}")


def main() -> None:
    """Write the first files, and fuzz."""
    corpus = _FOLDER / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)  # noqa: S311 - which files, no secret
    for number in range(_SEEDS):
        kind = FORMATS[number % len(FORMATS)]
        (corpus / f"sound-{number:03}").write_bytes(photograph(chance, kind))
        (corpus / f"spoilt-{number:03}").write_bytes(spoil(chance).data)
        (corpus / f"bomb-{number:03}").write_bytes(bomb(chance).data)
    atheris.Setup(
        [sys.argv[0], f"-artifact_prefix={_FOLDER}/", *_LIBFUZZER, *sys.argv[1:], str(corpus)], decode_or_refuse
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
