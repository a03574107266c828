"""The Lua scripts that run at the stream server. `lua/` has their texts."""

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any

from redis.exceptions import NoScriptError

from workers.redis.connection import StreamConnection


class Script:
    """A script at the server, for every kind of client: `await script(keys=[...], args=[...])`.

    It is sent by its digest (EVALSHA), and once as a whole where the server does not know it yet (NOSCRIPT), which is
    before anything has run. In a cluster it runs on the node of its keys, which must all be in one slot.

    Args:
        client: A client of the server that runs it.
        names: Files in `lua/`, joined in this order: preludes, whose names start with `_`, before the script itself.

    Attributes:
        text: The script itself.
    """

    def __init__(self, client: StreamConnection, *names: str) -> None:
        self._client = client
        self.text = "".join((files("workers.redis") / "lua" / name).read_text(encoding="utf-8") for name in names)
        self._digest = sha1(self.text.encode()).hexdigest()  # noqa: S324 - the server's name for it, no secret

    async def __call__(self, *, keys: Sequence[str], args: Sequence[str | bytes | float]) -> Any:
        """Run it.

        Args:
            keys: The streams and other keys that it uses.
            args: Its arguments.

        Returns:
            Its reply.
        """
        values = (len(keys), *keys, *args)
        try:
            return await self._client.evalsha(self._digest, *values)  # type: ignore[arg-type]  # bytes are sent as they are
        except NoScriptError:
            return await self._client.eval(self.text, *values)  # type: ignore[arg-type]  # the same
