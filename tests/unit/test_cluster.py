"""Joining a cluster that is not there."""

import socket

import pytest

from flawstream import cluster
from schemas.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_address_where_nobody_listens_is_refused(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever tests before this one have started
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"):
            cluster.connect(address)
