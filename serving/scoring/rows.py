"""Rows of results: one for every image of the listing, judged or not. The names are those of results on the stream."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from schemas.messages import DetectionResult, MapCodec, Verdict
from serving.scoring.listing import ListedImage
from serving.scoring.output import COUNTS
from workers.ports import Refusal

Outcome = DetectionResult | Refusal
"""How an image ends."""

_BOX = pa.struct([(name, pa.int32()) for name in ("x", "y", "width", "height")] + [("score", pa.float64())])
_RESULT = [
    ("path", pa.string()),
    ("category", pa.string()),
    ("model", pa.string()),
    ("score", pa.float64()),
    ("p_value", pa.float64()),
    ("threshold", pa.float64()),
    ("verdict", pa.string()),
    ("boxes", pa.list_(_BOX)),
    ("image_height", pa.int32()),
    ("image_width", pa.int32()),
]
_MAP = [
    ("map_codec", pa.string()),
    ("map_shape", pa.list_(pa.int32())),
    ("map_grids", pa.list_(pa.list_(pa.int32()))),
    ("map", pa.binary()),
]
_ERROR = [("error", pa.string()), ("error_detail", pa.string())]


def schema_of(maps: MapCodec) -> pa.Schema:
    """Return the columns of a run's results: those of maps only if there are any."""
    return pa.schema(_RESULT + ([] if maps is MapCodec.NONE else _MAP) + _ERROR)


def build_table(images: Sequence[ListedImage], outcomes: Sequence[Outcome], maps: MapCodec) -> pa.Table:
    """Build the rows of images, in their order; the same outcomes give the same bytes."""
    schema = schema_of(maps)
    rows = [_row(image, outcome) for image, outcome in zip(images, outcomes, strict=True)]
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    counts = {name: str(count) for name, count in count_outcomes(outcomes).items()}
    return pa.table(columns, schema=schema).replace_schema_metadata(counts)


def count_outcomes(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Count as `output.COUNTS` says."""
    refused = sum(isinstance(outcome, Refusal) for outcome in outcomes)
    anomalous = sum(
        isinstance(outcome, DetectionResult) and outcome.verdict is Verdict.ANOMALOUS for outcome in outcomes
    )
    return dict(zip(COUNTS, (len(outcomes), refused, anomalous), strict=True))


def _row(image: ListedImage, outcome: Outcome) -> Mapping[str, Any]:
    row: dict[str, Any] = {"path": _printable(image.path), "category": _printable(image.category)}
    if isinstance(outcome, Refusal):
        return row | {"error": outcome.reason.value, "error_detail": _printable(outcome.detail)}
    return row | {
        "model": outcome.model,
        "score": outcome.score,
        "p_value": outcome.p_value,
        "threshold": outcome.threshold,
        "verdict": outcome.verdict.value,
        "boxes": [box.model_dump() for box in outcome.boxes],
        "image_height": outcome.image_shape[0],
        "image_width": outcome.image_shape[1],
        "map_codec": outcome.map.codec.value,
        "map_shape": outcome.map.shape,
        "map_grids": outcome.map.grids,
        "map": outcome.map.data,
    }


def _printable(text: str) -> str:
    r"""Write bytes of a name that are not UTF-8 as `\udcff`: Parquet's text has no place for them."""
    return text.encode("utf-8", "backslashreplace").decode()
