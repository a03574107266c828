"""Redis spoken over a plain socket, as a PLC gateway would: none of our code, and no client library."""

import socket
from types import TracebackType
from typing import Self

Reply = int | bytes | None | list["Reply"]


class RawRedis:
    """One connection. Arguments are bytes or text; an error reply raises RuntimeError."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection((host, port), timeout=60)
        self._stream = self._socket.makefile("rb")

    def __call__(self, *arguments: bytes | str | int) -> Reply:
        parts = [one if isinstance(one, bytes) else str(one).encode() for one in arguments]
        self._socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(one), one) for one in parts))
        return self._read()

    def count(self, *arguments: bytes | str | int) -> int:
        """Run a command that answers with a number."""
        reply = self(*arguments)
        assert isinstance(reply, int)
        return reply

    def entries(self, stream: str, start: str = "-", count: int = 1 << 31) -> list[tuple[str, dict[str, bytes]]]:
        """Read a stream from an id on, at most so many entries."""
        found = []
        reply = self("XRANGE", stream, start, "+", "COUNT", count)
        assert isinstance(reply, list)
        for row in reply:
            assert isinstance(row, list)
            entry_id, flat = row
            assert isinstance(entry_id, bytes)
            assert isinstance(flat, list)
            texts = [one for one in flat if isinstance(one, bytes)]
            names = [name.decode("utf-8", "backslashreplace") for name in texts[::2]]
            found.append((entry_id.decode(), dict(zip(names, texts[1::2], strict=True))))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._socket.close()

    def _read(self) -> Reply:
        kind, rest = (line := self._stream.readline().rstrip(b"\r\n"))[:1], line[1:]
        if kind == b"-":
            raise RuntimeError(rest.decode())
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            if rest == b"-1":
                return None
            data = self._stream.read(int(rest) + 2)
            return data[:-2]
        assert kind == b"*", line
        return None if rest == b"-1" else [self._read() for _ in range(int(rest))]
