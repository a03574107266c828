"""Whether a document is what a cluster takes, and its pods what a careful platform team lets in: one at a time."""

import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate.utils import schema_contents
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource

from flawstream_cli.main import load_command
from helpers.chart.rendered import Body, Pod, pods
from schemas.settings import Settings, load_settings

VERSIONS = ("1.32", "1.34", "1.37")
"""Of Kubernetes: what distributions still support, and the newest that the library knows."""

_CUSTOM = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti|)")
_FACTORS = {"m": "0.001", "": "1", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12"} | {
    f"{letter}i": str(1024**power) for power, letter in enumerate("KMGT", 1)
}
_SETTINGS_FILE = "/etc/flawstream/settings.yaml"


def check(document: Body) -> None:
    """Check a document and its pods."""
    _check_schema(json.dumps(document, sort_keys=True))
    for pod in pods(document):
        _check_pod(json.dumps([pod.owner, pod.role, dict(pod.labels), dict(pod.annotations), pod.spec], sort_keys=True))
    if document["kind"] == "RayService":
        _check_service(document["spec"]["serveConfigV2"])
    if document["kind"] == "RayJob":
        check_command(shlex.split(document["spec"]["entrypoint"]))
    if document["kind"] == "RayCronJob":
        check_command(shlex.split(document["spec"]["jobTemplate"]["entrypoint"]))


@cache
def _check_schema(text: str) -> None:
    document = json.loads(text)
    kind = f"{document['apiVersion']}/{document['kind']}"
    if kind not in _CUSTOM:
        _check_kubernetes(document)
        return
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(document["metadata"]) <= {"name", "labels", "annotations"}
    _of_custom(kind).validate(document["spec"])


@cache
def _of_custom(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$defs": _CUSTOM["$defs"], **_CUSTOM[kind]})


def _check_kubernetes(document: Body) -> None:
    for version in VERSIONS:
        _of_kubernetes(version, document["kind"], document["apiVersion"]).validate(document)


@cache
def _of_kubernetes(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """Make the validator of `kubernetes_validate.validate(..., strict=True)`, which reads its files at each call."""
    group, _, number = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], number)))
    schema = schema_contents(f"{_folder(version)}/{name}.json", version)
    registry: Registry[Any] = Resource.from_contents(schema) @ _definitions(version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


@cache
def _definitions(version: str) -> Registry[Any]:
    contents = schema_contents(f"{_folder(version)}/_definitions.json", version)
    return (Resource.from_contents(contents) @ Registry()).crawl()


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}.0-local-strict"


@cache
def _check_pod(text: str) -> None:
    whose, role, labels, annotations, spec = json.loads(text)
    pod = Pod(whose, role, labels, annotations, spec)
    metadata = {"name": "pod", "labels": labels, "annotations": annotations}
    _check_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    _check_restricted(pod)
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    used = set()
    claimed = {"data"} if whose.startswith("StatefulSet") else set()  # a StatefulSet's own
    for container in pod.containers:
        mounts = container.get("volumeMounts", [])
        used |= {mount["name"] for mount in mounts}
        paths = [mount["mountPath"] for mount in mounts]
        assert len(set(paths)) == len(paths), f"{whose}: {paths}"
        _check_resources(container)
        _check_home(container, paths)
        names = [port["name"] for port in container.get("ports", [])]
        assert len(set(names)) == len(names)
        assert all(len(name) <= 15 for name in names)
        if role != "job" and container["name"] != "toolbox":
            assert container["livenessProbe"], whose
            assert container["readinessProbe"], whose
    assert used <= volumes | claimed, f"{whose}: {used - volumes} has no volume"
    assert volumes <= used, f"{whose}: nobody mounts {volumes - used}"


def _check_restricted(pod: Pod) -> None:
    """See that a pod is let in where the namespace asks for the Pod Security Standard `restricted`, and a bit more."""
    spec = pod.spec
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        assert not spec.get(name), name
    for volume in spec.get("volumes", []):
        assert set(volume) - {"name"} <= _VOLUMES, volume
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security.get("runAsUser", 1) > 0  # OpenShift sets one
    assert security["seccompProfile"]["type"] in {"RuntimeDefault", "Localhost"}
    assert not security.get("sysctls")
    for container in pod.containers:
        check_container_security(container["securityContext"])
        assert not any("hostPort" in port for port in container.get("ports", []))
    if spec.get("automountServiceAccountToken") is not False:
        assert pod.role == "ray-head", f"{pod.owner}: a token of the API server is mounted"
        assert spec["serviceAccountName"].endswith("-head")


def check_container_security(security: Body) -> None:
    """See that a container gives up all that it does not need."""
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["readOnlyRootFilesystem"] is True
    assert security["runAsNonRoot"] is True
    assert not security.get("privileged")


def _check_resources(container: Body) -> None:
    wanted, most = container["resources"]["requests"], container["resources"]["limits"]
    assert {"cpu", "memory"} <= set(wanted)
    assert "memory" in most
    for name, value in wanted.items():
        assert _amount(value) > 0
        assert name not in most or _amount(value) <= _amount(most[name]), f"{name}: more is asked for than allowed"


def _amount(quantity: object) -> Decimal:
    found = _QUANTITY.fullmatch(str(quantity))
    assert found, f"{quantity!r} is no quantity"
    return Decimal(found[1]) * Decimal(_FACTORS[found[2]])


def _check_home(container: Body, paths: list[str]) -> None:
    """See that what runs of ours has its settings, understands its arguments, and can write where it must."""
    environment = {item["name"]: item.get("value", "") for item in container.get("env", [])}
    assert len(environment) == len(container.get("env", [])), "a variable stands there twice"
    if environment.get("HOME"):
        assert environment["HOME"] in paths
    if "FLAWSTREAM_CONFIG" in environment:
        assert environment["FLAWSTREAM_CONFIG"] == _SETTINGS_FILE
        assert "/etc/flawstream" in paths
    if "args" in container and "command" not in container:
        check_command(["flawstream", *container["args"]])


@cache
def _parsed(arguments: tuple[str, ...]) -> None:
    command = load_command(arguments[0])
    command.make_context(arguments[0], list(arguments[1:]))


def check_command(line: list[str]) -> None:
    """See that our own command line takes it."""
    assert line[0] == "flawstream", line
    _parsed(tuple("." if argument == "/data" else argument for argument in line[1:]))


@cache
def settings_of(text: str, environment: tuple[tuple[str, str], ...]) -> Settings:
    """Read settings as a container's process would: its file, its environment."""
    before = {name: value for name, value in os.environ.items() if name.startswith("FLAWSTREAM_")}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            for name in before:
                del os.environ[name]
            os.environ |= dict(environment)
            return load_settings(Path(file.name))
        finally:
            for name, _ in environment:
                os.environ.pop(name, None)
            os.environ |= before


@cache
def _check_service(text: str) -> None:
    """See that Ray Serve takes the configuration, and our application what stands under it."""
    described = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = described.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(import_module(module), name))
    Settings.model_validate(application.args)


def serve_settings(document: Body) -> Mapping[str, Any]:
    """Give what the service is told of a RayService."""
    config = yaml.load(document["spec"]["serveConfigV2"], yaml.CSafeLoader)
    found: Mapping[str, Any] = config["applications"][0]["args"]
    return found


__all__ = ["VERSIONS", "check", "check_command", "check_container_security", "serve_settings", "settings_of"]
