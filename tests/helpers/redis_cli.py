"""What stands in for `redis-cli` where it is not installed: `python -m helpers.redis_cli PORT [-x] COMMAND...`.

It prints replies as redis-cli does when its output is not a terminal: each value on a line of its own, as it is.
"""

import sys

from helpers.raw_redis import RawRedis, Reply


def _print(reply: Reply) -> None:
    if isinstance(reply, list) and reply:
        for one in reply:
            _print(one)
    else:
        value = reply if isinstance(reply, bytes) else b"%d" % reply if isinstance(reply, int) else b""
        sys.stdout.buffer.write(value + b"\n")


if __name__ == "__main__":
    port, *command = sys.argv[1:]
    last = [sys.stdin.buffer.read()] if command[0] == "-x" else []
    with RawRedis(int(port)) as redis:
        _print(redis(*command[len(last) :], *last))
