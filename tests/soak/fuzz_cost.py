"""What decoding costs: the dearest of many image files in CPU seconds, and in memory over what the process had before.

    PYTHONPATH=tests python -m soak.fuzz_cost [--entries 10000] [--seed 0]

Takes the hostile images of the fuzz's entries, and the files of `soak.fuzz_dear_images`; decodes each in this process.
CPU time is the process's own, of all threads; other programs on the machine slow it down a little. The last line is
JSON; the exit code is 1 where a file takes more than 2 s or 512 MB.
"""

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError
from schemas.settings import LimitSettings
from soak.fuzz_corpus import corpus
from soak.fuzz_dear_images import dear_images

MOST_CPU_S = 2.0
MOST_MB = 512.0
_FORM = PixelForm(256)
_NO_WEB = "localhost:9"
_PRINTED = 10


@dataclass(frozen=True, slots=True)
class Cost:
    """What decoding a file took, or refusing it.

    Attributes:
        kind: What the file is.
        size_bytes: Its size.
        cpu_s: CPU time.
        peak_mb: Memory at its highest, over that before.
    """

    kind: str
    size_bytes: int
    cpu_s: float
    peak_mb: float


def measure(kind: str, data: bytes) -> Cost:
    """Decode a file."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest memory is counted anew: proc(5)
    base_mb = _memory_mb("VmRSS")
    began_s = time.process_time()
    with contextlib.suppress(MessageError):
        decode_image(data, _FORM, LimitSettings())
    cpu_s = time.process_time() - began_s
    return Cost(kind, len(data), cpu_s, _memory_mb("VmHWM") - base_mb)


def report(costs: list[Cost]) -> dict[str, dict[str, object]]:
    """Return the dearest files, for the last line."""
    by_cpu = max(costs, key=lambda cost: cost.cpu_s)
    by_memory = max(costs, key=lambda cost: cost.peak_mb)
    return {
        "dearest_cpu": {"kind": by_cpu.kind, "bytes": by_cpu.size_bytes, "s": round(by_cpu.cpu_s, 2)},
        "dearest_memory": {"kind": by_memory.kind, "bytes": by_memory.size_bytes, "mb": round(by_memory.peak_mb)},
    }


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{name}:"))


def _files(seed: int, entries: int) -> Iterator[tuple[str, bytes]]:
    hostile = corpus(seed, entries, _NO_WEB)
    return itertools.chain(
        ((entry.kind, entry.fields[b"image"]) for entry in hostile if b"image" in entry.fields), dear_images()
    )


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000, help="hostile entries (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same entries")
    options = parser.parse_args()
    for _, data in itertools.islice(_files(options.seed, 100), 100):
        measure("", data)  # what libraries load at first use is no file's
    costs = [measure(kind, data) for kind, data in _files(options.seed, options.entries)]
    for cost in sorted(costs, key=lambda cost: -cost.cpu_s)[:_PRINTED]:
        print(f"{cost.kind:<40} {cost.size_bytes:>12,} bytes {cost.cpu_s:6.2f} s {cost.peak_mb:6.0f} MB")
    print(json.dumps({"bench": "fuzz_cost", "files": len(costs)} | report(costs)))
    return int(any(cost.cpu_s > MOST_CPU_S or cost.peak_mb > MOST_MB for cost in costs))


if __name__ == "__main__":
    sys.exit(main())
