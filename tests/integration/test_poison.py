"""An image that kills its worker's process: it ends as poison, and its neighbours as results."""

import os
import subprocess
import sys
import time

from helpers.deadly_worker import DEADLY, MAX_DELIVERIES
from helpers.fakes import png
from helpers.places import ROOT, TESTS
from helpers.raw_redis import RawRedis
from helpers.waiting import Deadline

from workers.redis.embedded import EmbeddedServer


def test_an_image_that_kills_its_worker_is_poison_after_max_deliveries_and_its_neighbours_end_well() -> None:
    deaths = 0
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with EmbeddedServer() as server, RawRedis(server.port) as redis:
        for level in (10, 20, DEADLY, 30, 40):
            redis("XADD", "flawstream:images", "*", "id", f"grey-{level}", "category", "bottle", "image", png(level))
        deadline = Deadline("all images have ended")
        while redis.count("XLEN", "flawstream:images"):
            command = [sys.executable, "-m", "helpers.deadly_worker", server.url]
            with subprocess.Popen(command, cwd=ROOT, env=environment) as worker:  # noqa: S603 - our own program
                while worker.poll() is None and redis.count("XLEN", "flawstream:images"):
                    deadline.check()
                    time.sleep(0.05)
                deaths += worker.returncode == -9 if worker.poll() is not None else 0
                worker.terminate()
        results = {fields["id"].decode() for _, fields in redis.entries("flawstream:results")}
        ((_, letter),) = redis.entries("flawstream:dead")
    assert results == {f"grey-{level}" for level in (10, 20, 30, 40)}
    assert (letter["id"], letter["dead.reason"]) == (b"grey-66", b"poison")
    assert int(letter["dead.deliveries"]) == MAX_DELIVERIES + 1
    assert deaths == MAX_DELIVERIES
