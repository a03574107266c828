"""The embedded server: its life and its data."""

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
from helpers.raw_redis import RawRedis
from helpers.waiting import wait_until

from schemas.errors import ConfigError, StreamUnavailableError
from workers.redis.embedded import EmbeddedServer, free_port

_PARENT = """
import sys
from workers.redis.embedded import EmbeddedServer, free_port
server = EmbeddedServer()
server.start()
print(server.port, flush=True)
sys.stdin.read()
"""


def command(port: int, line: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(line + b"\r\n")
        return raw.makefile("rb").readline()


def test_the_server_answers_while_it_is_open_and_not_after() -> None:
    with EmbeddedServer() as server:
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
        assert command(server.port, b"PING") == b"+PONG\r\n"
        port = server.port
    with pytest.raises(ConnectionRefusedError):
        command(port, b"PING")


def test_data_in_a_folder_survive_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / 'it\'s a "folder"'
    with EmbeddedServer(folder) as server:
        assert command(server.port, b"XADD s * a b").startswith(b"$")
    with EmbeddedServer(folder) as server:
        assert command(server.port, b"XLEN s") == b":1\r\n"


def test_a_folder_is_used_by_one_server_at_a_time(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as first:
        with pytest.raises(ConfigError, match="another server uses the folder"):
            EmbeddedServer(tmp_path).start()
        assert command(first.port, b"PING") == b"+PONG\r\n"


def test_a_port_that_is_taken_is_refused() -> None:
    with EmbeddedServer() as first, pytest.raises(ConfigError, match=str(first.port)):
        EmbeddedServer(port=first.port).start()


def test_the_free_port_gives_way_where_it_is_taken() -> None:
    usual = free_port()
    assert free_port(usual) == usual
    with EmbeddedServer(port=usual):
        assert free_port(usual) != usual


def test_damaged_data_are_told_with_the_servers_last_words(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("no manifest\n")
    with pytest.raises(ConfigError, match="manifest"):
        EmbeddedServer(tmp_path).start()


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        EmbeddedServer(taken).start()


def test_the_server_ends_with_a_parent_that_was_killed() -> None:
    with subprocess.Popen(  # noqa: S603 - our own interpreter, our own text
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        with socket.create_connection(("127.0.0.1", port)) as raw:
            os.kill(parent.pid, signal.SIGKILL)
            assert raw.recv(1) == b""  # the server has closed its end
    with pytest.raises(ConnectionRefusedError):
        command(port, b"PING")


def server_pid(port: int) -> int:
    with RawRedis(port) as raw:
        info = raw("INFO", "server")
    assert isinstance(info, bytes)
    return int(info.partition(b"process_id:")[2].split()[0])


def test_a_server_that_was_killed_is_started_again_on_its_port_with_its_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failed = Event()
    caplog.set_level(logging.WARNING)
    with EmbeddedServer(tmp_path, on_failure=failed.set) as server:
        command(server.port, b"XADD s * a b")
        for round_ in (1, 2):
            os.kill(server_pid(server.port), signal.SIGKILL)
            wait_until(lambda n=round_: caplog.text.count("signal 9") == n, "the server is back")  # type: ignore[misc]  # n
        assert command(server.port, b"XLEN s") == b":1\r\n"
        server.require_running()
    assert not failed.is_set()
    with pytest.raises(ConnectionRefusedError):
        command(server.port, b"PING")


def test_a_server_that_cannot_write_any_more_is_given_up_with_its_reason(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full."""
    failed = Event()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EmbeddedServer(tmp_path, on_failure=failed.set) as server:
        resource.prlimit(server_pid(server.port), resource.RLIMIT_FSIZE, (1 << 16, hard))
        resource.prlimit(parent_of(server_pid(server.port)), resource.RLIMIT_FSIZE, (1 << 16, hard))

        def gave_up() -> bool:
            command(server.port, b"SET k " + b"x" * 20_000)
            return failed.is_set()

        wait_until(lambda: failed.is_set() or gave_up(), "the supervisor has given up", ignoring=(OSError,))
        with pytest.raises(StreamUnavailableError, match=r"has ended: .*started again 5 times"):
            server.require_running()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])


def test_a_server_without_a_folder_is_not_started_again_empty() -> None:
    failed = Event()
    with EmbeddedServer(on_failure=failed.set) as server:
        os.kill(server_pid(server.port), signal.SIGKILL)
        assert failed.wait(30)
        with pytest.raises(StreamUnavailableError, match=r"signal 9.*without a data folder"):
            server.require_running()


def test_a_supervisor_that_was_killed_is_noticed(tmp_path: Path) -> None:
    failed = Event()
    with EmbeddedServer(tmp_path, on_failure=failed.set) as server:
        pid = server_pid(server.port)
        os.kill(parent_of(pid), signal.SIGKILL)
        assert failed.wait(30)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(StreamUnavailableError, match="supervisor was killed"):
            server.require_running()


def test_its_memory_is_bounded_and_nothing_is_evicted(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server, RawRedis(server.port) as raw:
        most_bytes = raw("CONFIG", "GET", "maxmemory")
        policy = raw("CONFIG", "GET", "maxmemory-policy")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert policy == [b"maxmemory-policy", b"noeviction"]
    assert isinstance(most_bytes, list)
    assert isinstance(most_bytes[1], bytes)
    assert 0 < int(most_bytes[1]) <= machine // 2


def test_its_folder_and_files_are_its_users_alone_also_those_of_an_earlier_release(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        with EmbeddedServer(folder) as server:
            command(server.port, b"XADD s * a b")
        os.umask(before)
        modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
        assert {mode for path, mode in modes.items() if (tmp_path / path).is_dir()} == {0o700}
        assert {mode for path, mode in modes.items() if (tmp_path / path).is_file()} == {0o600}
        for path in modes:
            (tmp_path / path).chmod(0o755 if (tmp_path / path).is_dir() else 0o644)
