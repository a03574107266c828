"""Whether anything that can be pushed breaks a worker, is lost, ends twice, or is refused for a wrong reason.

    PYTHONPATH=tests python -m soak.fuzz [--entries 10000] [--seed 0]

Malformed entries, good ones between them, are pushed by plain XADD onto a real Valkey, where a real `flawstream worker`
reads. Claims: each entry ends exactly once; for a reason that is right for its kind; what is good, and nothing that
Pillow cannot read, gets a result; the process that started is the one that ends it; its memory does not grow; nothing
outside the allow-list was asked for; and no file costs more than `soak.fuzz_cost` allows. The last line is JSON; the
exit code is 1 where a claim fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from redis import Redis

from soak.fuzz_corpus import MAX_IMAGE_BYTES, FuzzEntry, corpus
from soak.fuzz_line import TRIMMED, TrapServer, WorkerProcess, write_model
from workers.redis.embedded import EmbeddedServer

MOST_GROWTH_MB = 96.0
"""How much more memory the worker may have at the end than after the first `WARM_UP` entries."""
WARM_UP = 2_000
_IMAGES, _RESULTS, _DEAD = "flawstream:images", "flawstream:results", "flawstream:dead"
_UNDER_WAY = 300
_PATIENCE_S = 120.0
_PAGE = 100
_RESULT = "result"


@dataclass
class Account:
    """What was pushed and how it ended.

    Attributes:
        waiting: What has not ended, by the id on the images stream.
        ended: Each end: kind, and the reason or `result`.
        wrong: Each end that is not right: the same, and what was said.
        readable: Damaged entries that Pillow reads, and good ones: no claim that they are refused.
        refused: Entries sure to be refused that have ended.
        duplicates: Ends of what had ended before, or was never pushed.
    """

    waiting: dict[str, FuzzEntry] = field(default_factory=dict)
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    readable: int = 0
    refused: int = 0
    duplicates: int = 0
    _ids: dict[bytes, str] = field(default_factory=dict)

    def push(self, redis: Redis, entries: list[FuzzEntry]) -> None:
        """Push with plain XADD."""
        pipe: Any = redis.pipeline(transaction=False)  # the client leaves this call untyped
        for entry in entries:
            pipe.execute_command("XADD", _IMAGES, "*", *(part for one in entry.fields.items() for part in one))
        for entry, entry_id in zip(entries, pipe.execute(), strict=True):
            self.waiting[entry_id.decode()] = entry
            self._ids[entry.fields.get(b"id", b"")] = entry_id.decode()

    def collect(self, redis: Redis) -> int:
        """Take what has ended off its streams.

        Returns:
            How many entries that was.
        """
        count = 0
        for stream in (_RESULTS, _DEAD):
            rows: Any = redis.xrange(stream, count=_PAGE)
            for _, fields in rows:
                if stream == _DEAD:
                    said = fields[b"dead.detail"].decode()
                    self._end(fields[b"dead.entry_id"].decode(), fields[b"dead.reason"].decode(), said)
                else:
                    self._end(self._ids.get(fields[b"id"], fields[b"id"].decode()), _RESULT, "")
            if rows:
                redis.xdel(stream, *(row_id for row_id, _ in rows))
            count += len(rows)
        return count

    def _end(self, entry_id: str, reason: str, said: str) -> None:
        entry = self.waiting.pop(entry_id, None)
        if entry is None:
            self.duplicates += 1
            return
        self.ended[entry.kind, reason] += 1
        self.readable += entry.may_pass
        self.refused += not entry.may_pass
        if not (entry.may_pass if reason == _RESULT else reason in entry.reasons):
            self.wrong.append((entry.kind, reason, said))


def run(entries: int, seed: int, folder: Path) -> dict[str, object]:
    """Push, collect, and judge.

    Returns:
        The figures of the last line.
    """
    write_model(str(folder / "models"))
    account = Account()
    with EmbeddedServer() as server, TrapServer() as web, Redis.from_url(server.url) as redis:
        redis.rpush("frames:list", "x")
        redis.set("frames:text", "no image at all")
        redis.set("frames:large", bytes(MAX_IMAGE_BYTES + 1))
        worker = WorkerProcess(server.url, str(folder / "models"), web.address, folder / "worker.log")
        try:
            worker.wait_until_ready()
            start_mb = _run_through(
                account, redis, worker, corpus(seed, entries, web.address), min(WARM_UP, entries // 2)
            )
            end_mb = worker.resident_mb()
            left = int(redis.xlen(_IMAGES))
            is_alive = worker.is_alive
        finally:
            own_account = worker.stop()
        trespasses = list(web.trespasses)
    for path in trespasses[:5]:
        print(f"asked for outside the allow-list: {path}")
    return {
        "bench": "fuzz",
        "entries": account.refused,
        "readable": account.readable,
        "dead": sum(count for (_, reason), count in account.ended.items() if reason != _RESULT),
        "results": sum(count for (_, reason), count in account.ended.items() if reason == _RESULT),
        "wrong_reason": _print_table(account),
        "lost": len(account.waiting) + max(0, left - len(account.waiting)),
        "duplicates": account.duplicates,
        "worker_restarts": int(not is_alive),
        "worker_errors": own_account.get("errors", -1),
        "trespasses": len(trespasses),
        "rss_mb": {"start": round(start_mb, 1), "end": round(end_mb, 1)},
    }


def _run_through(account: Account, redis: Redis, worker: WorkerProcess, entries: Any, warm_up: int) -> float:
    """Push all entries, a bounded number under way, until each has ended or nothing ends any more.

    Returns:
        The worker's resident memory once it was warm, in MB.
    """
    start_mb = 0.0
    more = True
    last_end = time.monotonic()
    while (more or account.waiting) and worker.is_alive and time.monotonic() - last_end < _PATIENCE_S:
        if more and len(account.waiting) < _UNDER_WAY:
            batch = list(islice(entries, _PAGE))
            more = bool(batch)
            if batch:
                account.push(redis, batch)
        if account.collect(redis):
            last_end = time.monotonic()
        elif len(account.waiting) >= _UNDER_WAY or not more:
            time.sleep(0.02)
        if not start_mb and account.refused >= warm_up:
            start_mb = worker.resident_mb()
    return start_mb


def _print_table(account: Account) -> int:
    """Print kinds by reason.

    Returns:
        How many ends were wrong.
    """
    reasons = sorted({reason for _, reason in account.ended})
    kinds = sorted({kind for kind, _ in account.ended})
    width = max(map(len, kinds), default=0)
    print(" " * width, *reasons)
    for kind in kinds:
        print(f"{kind:<{width}}", *(f"{account.ended[kind, reason] or '':>{len(reason)}}" for reason in reasons))
    for (kind, reason), count in Counter((kind, reason) for kind, reason, _ in account.wrong).most_common():
        said = next(said for one, other, said in account.wrong if (one, other) == (kind, reason))
        print(f"WRONG: {kind}: {reason}, {count} times {said[:160]}")
    for kind, count in Counter(entry.kind for entry in account.waiting.values()).most_common():
        print(f"LOST: {kind}: {count} times")
    return len(account.wrong)


def holds(figures: dict[str, Any], entries: int) -> bool:
    """Tell whether every claim holds."""
    none = ("wrong_reason", "lost", "duplicates", "worker_restarts", "worker_errors", "trespasses")
    grown_mb = figures["rss_mb"]["end"] - figures["rss_mb"]["start"]
    return figures["entries"] >= entries and not any(figures[name] for name in none) and grown_mb < MOST_GROWTH_MB


def measure_costs(entries: int, seed: int, log: Path) -> tuple[dict[str, object], bool]:
    """Measure what the files cost, in a process of its own; what libraries print of damaged files goes to the log.

    Returns:
        Its figures, and whether none was too dear.
    """
    command = [sys.executable, "-m", "soak.fuzz_cost", "--entries", str(entries), "--seed", str(seed)]
    with log.open("wb") as errors:
        done = subprocess.run(  # noqa: S603 - our own program
            command, env=os.environ | TRIMMED, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
    *table, last = done.stdout.splitlines() or ["{}"]
    print(*table, sep="\n")
    figures: dict[str, object] = json.loads(last)
    return {name: figure for name, figure in figures.items() if name.startswith("dearest")}, done.returncode == 0


def main() -> int:
    """Run the benchmark; the exit code tells whether the claims hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000, help="entries that must be refused")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same entries")
    parser.add_argument("--no-costs", action="store_true", help="do not measure CPU time and memory of dear files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = run(arguments.entries, arguments.seed, folder)
        costs: dict[str, object] = {}
        cheap = True
        if not arguments.no_costs:
            costs, cheap = measure_costs(arguments.entries, arguments.seed, folder / "costs.log")
        passed = holds(figures, arguments.entries)
        for log, ok in (("worker.log", passed), ("costs.log", cheap)):
            if not ok:
                text = (folder / log).read_text(encoding="utf-8", errors="replace")
                print(f"the end of {log}:", *text.splitlines()[-30:], sep="\n", file=sys.stderr)
    print(json.dumps(figures | costs))
    return 0 if passed and cheap else 1


if __name__ == "__main__":
    sys.exit(main())
