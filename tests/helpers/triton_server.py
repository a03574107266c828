"""A real tritonserver for tests, from the environment that `make test-triton` sets up."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from helpers.places import ROOT
from helpers.waiting import wait_until

PYTHON = ROOT / ".venv-triton" / "bin" / "python"
_START_S = 120.0
_WHERE = """
import json, sys, sysconfig, pytriton
print(json.dumps([pytriton.__path__[0], sysconfig.get_config_var("LIBDIR"), sysconfig.get_path("purelib"),
                  f"{sys.version_info.major}.{sys.version_info.minor}"]))
"""


class TritonServer:
    """A server on a model repository, while a `with` block lasts.

    Args:
        repository: The folder.
        scratch: A folder for what the server needs beside it.
    """

    def __init__(self, repository: Path, scratch: Path) -> None:
        self._repository = repository
        self._scratch = scratch
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def log(self) -> str:
        return (self._scratch / "tritonserver.log").read_text(encoding="utf-8")

    def __enter__(self) -> Self:
        package, libraries, packages, version = json.loads(subprocess.check_output([PYTHON, "-c", _WHERE]))  # noqa: S603 - ours
        server = Path(package) / "tritonserver"
        backend = self._scratch / "backends" / "python"
        backend.mkdir(parents=True)
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        for file in (*(server / "backends" / "python").glob("*.*"), stub):
            (backend / file.name).hardlink_to(file)
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={self._repository}",
            f"--backend-directory={backend.parent}",
            "--model-control-mode=explicit",
            "--load-model=flawstream",
            "--load-model=backbone",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self._port}",
            "--allow-http=false",
            "--allow-metrics=false",
        ]
        environment = os.environ | {
            # Python's own folder first: the stub would load the system's libpython, another version, and die
            "LD_LIBRARY_PATH": f"{libraries}:{Path(package).parent / 'nvidia_pytriton.libs'}",
            "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
            "PYTHONPATH": packages,
        }
        with (self._scratch / "tritonserver.log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603 - ours
        self._wait()
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have the server answer nothing meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _wait(self) -> None:
        assert self._process is not None
        process = self._process
        try:
            with InferenceServerClient(self.address) as client:
                wait_until(
                    lambda: process.poll() is not None or client.is_server_ready(),
                    lambda: f"tritonserver answers\n{self.log()}",
                    deadline_s=_START_S,
                    ignoring=(InferenceServerException,),
                )
            assert process.poll() is None, f"tritonserver did not start:\n{self.log()}"
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the server, as a lost machine would be."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.stop()
