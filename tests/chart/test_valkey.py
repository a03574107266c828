"""The bundled Valkey servers: what restarts them, and what does not."""

from typing import Any

import pytest
from helpers.chart.rendered import Body, merged, profile, render


def servers(values: dict[str, Any]) -> dict[str, Body]:
    """Give the pod template of each Valkey server: its pod restarts when that changes."""
    everything = merged(profile("gpu"), values)
    return {d["metadata"]["name"]: d["spec"]["template"] for d in render(everything) if d["kind"] == "StatefulSet"}


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": "0.2.0"}},
        {"image": {"digest": f"sha256:{'a' * 64}"}},
        {"settings": {"worker": {"batch_size": 7}}, "training": {"gpus": 2}},
    ],
    ids=["tag", "digest", "settings"],
)
def test_upgrade_of_flawstream_restarts_no_valkey(values: dict[str, Any]) -> None:
    before = servers({})
    assert set(before) == {"line-flawstream-redis", "line-flawstream-gcs-redis"}
    assert servers(values) == before


def test_valkey_has_its_own_version() -> None:
    for name, template in servers(
        {"image": {"valkey": {"repository": "registry.plant/valkey", "tag": "9.1.2"}}}
    ).items():
        (container,) = template["spec"]["containers"]
        assert container["image"] == "registry.plant/valkey:9.1.2", name
