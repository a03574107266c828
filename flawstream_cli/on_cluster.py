"""A Ray cluster for as long as a command needs one."""

import contextlib
from collections.abc import Iterator

from flawstream import cluster
from flawstream_cli.terminal import busy


@contextlib.contextmanager
def on_cluster(address: str | None) -> Iterator[cluster.Cluster]:
    """Join the cluster at an address, or start one on this machine; leave it, or end it, whatever happens.

    Raises:
        ConfigError: No cluster answers at the address.
    """
    try:
        with busy("starting Ray" if address is None else f"joining Ray at {address}"):
            joined = cluster.connect(address)
        yield joined
    finally:
        cluster.disconnect()
