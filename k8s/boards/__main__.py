"""Generates `k8s/flawstream/files/dashboards/*.json`: `python -m k8s.boards`. A test compares them."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from k8s.boards import operations, quality, training
from k8s.boards.panels import write

FOLDER = Path(__file__).parents[1] / "flawstream" / "files" / "dashboards"
BOARDS = {"operations": operations.BOARD, "quality": quality.BOARD, "training": training.BOARD}


def make(name: str) -> str:
    """Return the JSON file of a board."""
    return json.dumps(write(BOARDS[name]), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in BOARDS:
        (FOLDER / f"{name}.json").write_text(make(name), encoding="utf-8")
