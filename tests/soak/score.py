"""Whether a scoring run that is killed and continued scores every image once, and as a stream worker does.

    PYTHONPATH=tests python -m soak.score [--images 20000] [--compare 4000] [--folder KEPT]

Images of two categories, damaged ones among them, are scored by a real `flawstream score` with Ray Data and a real
engine. An actor is killed, and twice the command with all its processes, each time with SIGKILL; another version is
promoted meanwhile. Claims: every image has one row, judged by the version that the run began with; a real stream worker
gives the same scores, verdicts, boxes and errors. The last line is JSON; the exit code is 1 where a claim fails.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
from helpers.tiny_models import FLOW, write_version
from helpers.waiting import wait_until
from redis import Redis

from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import Registry
from schemas.messages import DetectionResult, MapCodec, Verdict
from schemas.settings import ModelSettings, RedisSettings, RegistrySettings, Settings, WorkerSettings
from schemas.wire import parse_result
from serving.detector import DetectorService, make_detector
from serving.scoring.listing import ListedImage
from serving.scoring.scorer import Scorer
from workers.consume.sharded import ShardedWorker
from workers.redis.connection import make_client
from workers.redis.embedded import EmbeddedServer

CATEGORIES = ("bottle", "cable")
_SIDE_PX = 64
_DAMAGED_EVERY = 199
_WAVE = 500
_KILLS = ((1 / 6, "actor"), (1 / 3, "command"), (2 / 3, "command"))
"""What is killed once such a share of the parts is written."""
_PLAIN = 1000
"""Images that are scored without Ray, for the speed and the threshold."""
_PATIENCE_S = 120.0
_RESULT_COLUMNS = ("verdict", "model", "p_value", "threshold")


def write_images(folder: Path, count: int) -> list[ListedImage]:
    """Write small PNGs, each another one, every so many damaged; those that are there stay."""
    noise = np.random.default_rng(0)
    images = []
    for number in range(count):
        category = CATEGORIES[number % len(CATEGORIES)]
        path = folder / category / f"{number // 1000:03}" / f"{number:06}.png"
        images.append(ListedImage(str(path), category))
        pixels = cv2.resize(noise.integers(0, 256, (4, 4, 3), np.uint8), (96, 80), interpolation=cv2.INTER_CUBIC)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        data = cv2.imencode(".png", pixels)[1].tobytes()
        path.write_bytes(data[: len(data) // 2] if number % _DAMAGED_EVERY == 1 else data)
    return images


def write_versions(root: Path, images: Sequence[ListedImage]) -> float:
    """Write versions with random weights, and a threshold that half of the images is above.

    Returns:
        Images per second of the engine in this process, without Ray.
    """
    registry = Registry(str(root))
    spec = Backbone(ModelSettings(input_size=_SIDE_PX)).spec
    weights = {category: FastFlowHead(spec, FLOW).to_bytes() for category in CATEGORIES}
    for category in CATEGORIES:
        write_version(registry, category, "v0", spec=spec, weights=weights[category])
        write_version(registry, category, "v2", spec=spec, promote=False)
    results, rate = score_plainly(root, images)
    for category in CATEGORIES:
        scores = sorted(result.score for result in results if result.category == category)
        write_version(registry, category, "v1", spec=spec, weights=weights[category], scores=scores[: len(scores) // 2])
    return rate


def score_plainly(root: Path, images: Sequence[ListedImage]) -> tuple[list[DetectionResult], float]:
    """Score images in this process.

    Returns:
        The results, and images per second without the time to load.
    """

    async def score() -> tuple[list[DetectionResult], float]:
        detector = open_detector(root)
        await detector.start()
        scorer = Scorer(detector, Settings(), MapCodec.NONE, os.cpu_count() or 1)
        began_s = time.perf_counter()
        outcomes = await scorer.score(images)
        duration_s = time.perf_counter() - began_s
        scorer.close()
        await detector.stop()
        return [outcome for outcome in outcomes if isinstance(outcome, DetectionResult)], len(images) / duration_s

    return asyncio.run(score())


def open_detector(root: Path) -> DetectorService:
    """Open a detector as a worker does."""
    settings = Settings()
    return make_detector(str(root), settings.model, settings.detector)


@dataclass
class Command:
    """A `flawstream score` in processes of its own.

    Attributes:
        arguments: Of the command.
        driver_mb: Most memory of the command's own process so far.
    """

    arguments: list[str]
    driver_mb: float = 0.0

    def run(self, log: Path) -> "subprocess.Popen[bytes]":
        """Start it."""
        with log.open("ab") as messages:
            return subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "flawstream_cli", "score", *self.arguments, "--json"],
                stdout=subprocess.PIPE,
                stderr=messages,
            )

    def run_until(self, process: "subprocess.Popen[bytes]", out: Path, parts: int) -> None:
        """Wait until so many parts are written, or the command has ended."""
        while process.poll() is None and written(out) < parts:
            self._measure(process)
            time.sleep(0.05)

    def finish(self, process: "subprocess.Popen[bytes]") -> tuple[int, dict[str, Any]]:
        """Wait for its end; gives the exit code and what it printed."""
        while process.poll() is None:
            self._measure(process)
            time.sleep(0.1)
        assert process.stdout is not None
        with process.stdout as output:
            return process.returncode, json.loads(output.read() or b"{}")

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill it with SIGKILL, and then what it has started, as a machine that loses power would."""
        started = descendants(process.pid)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        for pid in started:
            kill(pid)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "no process is left")

    def _measure(self, process: "subprocess.Popen[bytes]") -> None:
        status = read(f"/proc/{process.pid}/status")
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                self.driver_mb = max(self.driver_mb, int(line.split()[1]) / 1024)


def written(out: Path) -> int:
    """Count the parts that are written."""
    return len(list(out.glob("part-*.parquet")))


def descendants(pid: int) -> list[int]:
    """List the processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := read(f"{entry}/stat")):
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill_actor(driver: int) -> bool:
    """Kill the first actor that scores; gives whether there was one."""
    for pid in descendants(driver):
        if "MapWorker" in read(f"/proc/{pid}/cmdline"):
            kill(pid)
            return True
    return False


def kill(pid: int) -> None:
    """Kill one of the command's processes, if it still runs."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def read(path: str) -> str:
    """Read a file of /proc; empty where the process has ended."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


async def judge_by_worker(
    root: Path, server: EmbeddedServer, images: Sequence[ListedImage]
) -> Mapping[str, DetectionResult | str]:
    """Push images onto a stream where a real worker reads; gives each path's result or dead letter's reason."""
    settings = Settings(
        redis=RedisSettings(url=server.url, block_ms=20),
        registry=RegistrySettings(root=str(root)),
        worker=WorkerSettings(map_codec=MapCodec.NONE),
    )
    outcomes: dict[str, DetectionResult | str] = {}
    detector = open_detector(root)
    await detector.start()
    stop = asyncio.Event()
    async with make_client(settings.redis) as client:
        worker = ShardedWorker(client, "line", detector, settings)
        working = asyncio.create_task(worker.run(stop))
        for first in range(0, len(images), _WAVE):
            wave = images[first : first + _WAVE]
            outcomes |= await asyncio.to_thread(_push_and_wait, server.port, wave)
        stop.set()
        await working
        await worker.close()
    await detector.stop()
    return outcomes


def _push_and_wait(port: int, wave: Sequence[ListedImage]) -> dict[str, DetectionResult | str]:
    outcomes: dict[str, DetectionResult | str] = {}
    with Redis(port=port) as redis:
        for number, image in enumerate(wave):
            fields: Any = {"id": str(number), "category": image.category, "image": Path(image.path).read_bytes()}
            redis.xadd("flawstream:images", fields)
        deadline_s = time.monotonic() + _PATIENCE_S
        while len(outcomes) < len(wave) and time.monotonic() < deadline_s:
            time.sleep(0.02)
            for stream in ("flawstream:results", "flawstream:dead"):
                rows: Any = redis.xrange(stream)
                for entry_id, fields in rows:
                    path = wave[int(fields[b"id"])].path
                    dead = stream.endswith("dead")
                    outcomes[path] = fields[b"dead.reason"].decode() if dead else parse_result(fields)
                    redis.xdel(stream, entry_id)
    return outcomes


def differences(row: Mapping[str, Any], streamed: DetectionResult | str) -> Iterator[str]:
    """Compare a row with what a worker published: its numbers are float32 written with nine digits, which is exact."""
    if isinstance(streamed, str):
        if row["error"] != streamed:
            yield f"error {row['error']} and on the stream {streamed}"
        return
    if np.float32(row["score"]) != np.float32(streamed.score):
        yield f"score {row['score']} and on the stream {streamed.score}"
    for name in _RESULT_COLUMNS:
        ours, theirs = row[name], getattr(streamed, name)
        if (f"{ours:.9g}" != f"{theirs:.9g}") if isinstance(ours, float) else (ours != theirs):
            yield f"{name} {ours} and on the stream {theirs}"
    if row["boxes"] != [box.model_dump() for box in streamed.boxes]:
        yield f"boxes {row['boxes']} and on the stream {streamed.boxes}"
    if (row["image_height"], row["image_width"]) != streamed.image_shape:
        yield "another size"


def main(folder: Path, count: int, compared: int, images_per_part: int) -> int:
    """Run it all.

    Returns:
        The exit code.
    """
    images = write_images(folder / "images", count)
    root, out = folder / "models", folder / "results.parquet"
    plain_rate = None if root.exists() else write_versions(root, images[:_PLAIN])
    parts = -(-count // images_per_part)
    command = Command([str(folder / "images"), "--category-from", "folder", "--out", str(out), "--registry", str(root)])
    command.arguments += ["--images-per-part", str(images_per_part)]
    log = folder / "messages.txt"
    killed: Counter[str] = Counter()
    process = None
    for share, kind in _KILLS:
        if written(out) >= parts * share:  # by an earlier run in the same folder
            continue
        process = process or command.run(log)
        command.run_until(process, out, max(1, int(parts * share)))
        if kind == "actor":
            killed[kind] += kill_actor(process.pid)
            continue
        killed[kind] += process.poll() is None
        command.kill(process)
        process = None
        for category in CATEGORIES:
            Registry(str(root)).promote(category, "v2")
    began_s = time.perf_counter()
    code, report = command.finish(process or command.run(log))
    last_run_s = time.perf_counter() - began_s
    for category in CATEGORIES:
        Registry(str(root)).promote(category, "v1")

    rows = pq.read_table(out).to_pylist()
    by_path = {row["path"]: row for row in rows}
    with EmbeddedServer() as server:
        sample = images[:: max(1, count // compared)]
        streamed = asyncio.run(judge_by_worker(root, server, sample))
    wrong = {path: list(differences(by_path[path], outcome)) for path, outcome in streamed.items() if path in by_path}
    different = {path: found for path, found in wrong.items() if found}
    not_v1 = sum(row["error"] is None and not row["model"].endswith("@v1") for row in rows)
    verdicts = Counter(row["verdict"] for row in rows)
    for path, found in itertools.islice(different.items(), 10):
        print(f"{path}: {'; '.join(found)}", file=sys.stderr)
    summary = {
        "bench": "score",
        "images": count,
        "rows": len(rows),
        "missing": len({image.path for image in images} - by_path.keys()),
        "doubled": len(rows) - len(by_path),
        "other_version": not_v1,
        "compared": len(streamed),
        "different": len(different),
        "anomalous": verdicts[Verdict.ANOMALOUS.value],
        "normal": verdicts[Verdict.NORMAL.value],
        "errors": dict(Counter(row["error"] for row in rows if row["error"])),
        "actors_killed": killed["actor"],
        "commands_killed": killed["command"],
        "exit_code": code,
        "images_per_s": round(report.get("scored_now", 0) / report["duration_s"], 1) if report else None,
        "plain_images_per_s": plain_rate and round(plain_rate, 1),
        "last_run_s": round(last_run_s, 1),
        "driver_mb": round(command.driver_mb),
    }
    print(json.dumps(summary))
    failed = (
        any(summary[name] for name in ("missing", "doubled", "other_version", "different"))
        or len(streamed) != len(sample)
        or code != bool(summary["errors"])
        or not (
            killed["actor"]
            and killed["command"]
            and verdicts[Verdict.ANOMALOUS.value]
            and verdicts[Verdict.NORMAL.value]
        )
    )
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--compare", type=int, default=4_000, help="images that a stream worker judges as well")
    parser.add_argument("--images-per-part", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="for images, versions and results; kept, and continued")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(options.folder or Path(temporary), options.images, options.compare, options.images_per_part))
