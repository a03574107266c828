"""What integration tests share: one Ray cluster on this machine."""

from collections.abc import Iterator

import pytest

from flawstream_cli import cluster as ray_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[ray_cluster.Cluster]:
    """Start a Ray cluster for all tests that ask for it."""
    yield ray_cluster.connect()
    ray_cluster.disconnect()
