"""A context manager for a Ray cluster."""

import contextlib
from collections.abc import Iterator

from flawstream import cluster
from flawstream_cli.terminal import busy


@contextlib.contextmanager
def on_cluster(address: str | None) -> Iterator[cluster.Cluster]:
    """Connect to the Ray cluster at an address, or start one on this machine; disconnect when the context ends.

    Raises:
        ConfigError: No cluster answers at the address.
    """
    try:
        with busy("starting Ray" if address is None else f"connecting to Ray at {address}"):
            connected = cluster.connect(address)
        yield connected
    finally:
        cluster.disconnect()
