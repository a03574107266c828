"""What the fuzz runs against: a real `flawstream worker`, a model for it, and a web server with traps."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from helpers.tiny_models import write_version

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import ModelSettings
from soak.fuzz_corpus import CATEGORY, KEY_PREFIX, MAX_IMAGE_BYTES, S3_PREFIX, WEB_PATH

TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Else glibc keeps blocks that are freed, a few hundred MB of them, which would hide what is never freed."""
_CLOSED_PORT = "http://127.0.0.1:9"
_STOP_S = 60
_SIDE_PX = 64


def write_model(root: str) -> None:
    """Publish a version of the one category: the default backbone, and a flow that was never trained."""
    write_version(Registry(root), CATEGORY, spec=Backbone(ModelSettings(input_size=_SIDE_PX)).spec)


class _Answers(BaseHTTPRequestHandler):
    trespasses: ClassVar[list[str]]

    def do_GET(self) -> None:
        host, name = self.headers.get("Host", ""), self.path.partition("?")[0].removeprefix(WEB_PATH)
        if not self.path.startswith(WEB_PATH) or not host.startswith("localhost:"):
            self.trespasses.append(self.path)
        status, headers, body = _ANSWERS.get(name, (404, {}, b""))
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        if name != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        with contextlib.suppress(OSError):  # the worker has enough
            while name == "endless":
                self.wfile.write(bytes(1 << 16))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


_ANSWERS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "redirect": (302, {"Location": "/secrets"}, b""),
    "broken": (500, {}, b""),
    "text": (200, {}, b"no image at all"),
    "gzip": (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"),
    "endless": (200, {}, b""),
}


class TrapServer:
    """A web server on loopback: some answers under the allowed path, and a note of what was asked beside it.

    Attributes:
        trespasses: Paths outside the allow-list.
    """

    def __init__(self) -> None:
        self.trespasses: list[str] = []
        answers = type("Answers", (_Answers,), {"trespasses": self.trespasses})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        """Give `host:port`, as the allow-list has it."""
        return f"localhost:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class WorkerProcess:
    """A `flawstream worker` in a process of its own.

    Args:
        redis_url: Where the streams are.
        registry: Where the model is.
        web: What the allow-list has of web servers.
        log: Where its standard error goes.
    """

    def __init__(self, redis_url: str, registry: str, web: str, log: Path) -> None:
        settings = {
            "FLAWSTREAM_LIMITS__MAX_IMAGE_BYTES": str(MAX_IMAGE_BYTES),
            "FLAWSTREAM_REFERENCES__ALLOW": json.dumps([KEY_PREFIX, S3_PREFIX, f"http://{web}{WEB_PATH}"]),
            "FLAWSTREAM_REFERENCES__TRIES": "2",
            # should a reference to S3 slip through, it leads nowhere
            "AWS_ENDPOINT_URL": _CLOSED_PORT,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        options = ("--redis", redis_url, "--registry", registry, "--name", "fuzz", "--engine", "torch")
        with log.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
                [sys.executable, "-m", "flawstream_cli", "worker", *options],
                env=os.environ | TRIMMED | settings,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def is_alive(self) -> bool:
        """Tell whether the very process that was started still runs."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait for its first line.

        Raises:
            RuntimeError: It ended instead.
        """
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line.startswith("{"):
            raise RuntimeError(f"the worker did not start: {line}")

    def resident_mb(self) -> float:
        """Tell how much memory it has; 0 where it is gone."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return 0.0
        return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0.0)

    def stop(self) -> dict[str, object]:
        """Have it finish and give its own account; empty where it died."""
        self._process.terminate()
        try:
            said, _ = self._process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, _ = self._process.communicate()
        lines = said.strip().splitlines()
        account: dict[str, object] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return account
