"""Where replicas run in a cluster as the Helm chart starts it: a head without CPUs, and nodes for the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.tiny_models import write_version

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import Settings
from workers.redis.embedded import free_port

DEADLINE_S = 240.0
SCRIPT = """
import json, os, sys
import ray
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from schemas.settings import Settings
from serving import app

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=4)
ray.init(address=cluster.address, log_to_driver=False)
app.run(Settings.model_validate_json(sys.argv[1]))
deployments = _get_global_client().get_serve_details()["applications"]["flawstream"]["deployments"]
nodes = {name: [replica["node_id"] for replica in one["replicas"]] for name, one in deployments.items()}
print(json.dumps({"head": cluster.head_node.node_id, "nodes": nodes}), flush=True)
app.stop()
ray.shutdown()
cluster.shutdown()
"""


def test_no_replica_runs_on_the_head(tmp_path: Path) -> None:
    """With the head's pod goes Ray's own state; HTTP answers on while it restarts only if no replica was there."""
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(Registry(str(tmp_path)), "bottle", spec=spec)
    settings = Settings.model_validate(
        {
            "registry": {"root": str(tmp_path)},
            "api": {"port": free_port()},
            "worker": {"replicas": 0},
            "detector": {"engine": "torch", "num_cpus": 1},
        }
    )
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", SCRIPT, settings.model_dump_json(exclude_unset=True)],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: len(nodes) for name, nodes in found["nodes"].items()} == {"Api": 1, "Detector": 1}
    assert found["head"] not in {node for nodes in found["nodes"].values() for node in nodes}
