"""What real processes write to standard error with `logging.format=json`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from helpers.fakes import png
from helpers.raw_redis import RawRedis
from helpers.tiny_models import write_version
from helpers.waiting import wait_until

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import Settings
from workers.redis.embedded import EmbeddedServer

JSON = os.environ | {"FLAWSTREAM_LOGGING__FORMAT": "json", "FLAWSTREAM_LOGGING__LEVEL": "DEBUG"}


def test_a_worker_writes_nothing_but_json_and_no_image(tmp_path: Path) -> None:
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(Registry(str(tmp_path)), "bottle", spec=spec)
    with EmbeddedServer() as server, RawRedis(server.port) as redis:
        redis("XADD", "flawstream:images", "*", "id", "part-1", "category", "bottle", "image", png())
        redis("XADD", "flawstream:images", "*", "id", "part-2", "category", "bottle", "image", b"SECRET" * 100)
        program = [sys.executable, "-m", "flawstream_cli", "worker", "--redis", server.url, "--engine", "torch"]
        with subprocess.Popen(  # noqa: S603 - our own program
            [*program, "--registry", str(tmp_path)], env=JSON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            wait_until(
                lambda: process.poll() is not None or not redis.count("XLEN", "flawstream:images"),
                "both images have ended",
            )
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate()
    lines = [json.loads(line) for line in told.splitlines()]
    assert {line.get("image_id") for line in lines} >= {"part-1", "part-2"}
    assert {line.get("model") for line in lines} >= {"bottle@v1"}
    assert "SECRET" not in told
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_an_error_that_ends_a_command_is_json_too() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "flawstream_cli", "dead", "list", "--redis", "redis://127.0.0.1:1/0"],
        env=JSON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 4
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert (lines[-1]["level"], "stream_unavailable" in lines[-1]["message"]) == ("ERROR", True)


def test_a_terminal_is_told_in_words_where_nothing_is_set() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "flawstream_cli", "dead", "list", "--redis", "redis://127.0.0.1:1/0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr.startswith("error (stream_unavailable)")
