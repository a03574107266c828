"""An image whose decoding never returns: its worker ends, it becomes poison, its neighbours become results."""

import os
import subprocess
import sys
import time

from helpers.fakes import png
from helpers.hanging_worker import HANGS_PX
from helpers.places import ROOT, TESTS
from helpers.raw_redis import RawRedis
from helpers.waiting import Deadline

from workers.redis.embedded import EmbeddedServer

MAX_DELIVERIES = 2


def test_an_image_that_hangs_ends_its_worker_each_time_and_is_poison_after_max_deliveries() -> None:
    exit_codes: list[int] = []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS))),
        "FLAWSTREAM_WORKER__MAX_DELIVERIES": str(MAX_DELIVERIES),
        "FLAWSTREAM_WORKER__STAGE_TIMEOUT_S": "1",
    }
    with EmbeddedServer() as server, RawRedis(server.port) as redis:
        for number, size_px in enumerate((8, 8, HANGS_PX, 8, 8)):
            image = png(size=(size_px, size_px))
            redis("XADD", "flawstream:images", "*", "id", f"part-{number}", "category", "bottle", "image", image)
        deadline = Deadline("all images have ended")
        while redis.count("XLEN", "flawstream:images"):
            command = [sys.executable, "-m", "helpers.hanging_worker", "worker", "--redis", server.url, "--name", "a"]
            with subprocess.Popen(command, cwd=ROOT, env=environment) as worker:  # noqa: S603 - our own program
                try:
                    while worker.poll() is None and redis.count("XLEN", "flawstream:images"):
                        deadline.check()
                        time.sleep(0.05)
                finally:
                    code = worker.poll()
                    worker.kill()
            if code is not None:
                exit_codes.append(code)
        results = {fields["id"].decode() for _, fields in redis.entries("flawstream:results")}
        ((_, letter),) = redis.entries("flawstream:dead")
    assert exit_codes == [1] * MAX_DELIVERIES
    assert results == {"part-0", "part-1", "part-3", "part-4"}
    assert (letter["id"], letter["dead.reason"]) == (b"part-2", b"poison")
    assert int(letter["dead.deliveries"]) == MAX_DELIVERIES + 1
