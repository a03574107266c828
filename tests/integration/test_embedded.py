"""The embedded server: its life and its data."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import ConfigError
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
