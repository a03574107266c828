"""The check of every node before training: that it reads the data, shares the registry and has the driver's packages.

Knows no torch: a node answers as soon as a process of Ray has started there.
"""

import logging
import platform
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flawstream import storage
from flawstream.storage import Location
from schemas.errors import ConfigError, FlawstreamError, one_line
from training.datasets.storage import read_file

_log = logging.getLogger(__name__)

_PACKAGES = ("flawstream", "torch")


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a node found.

    Attributes:
        problems: Why training must not start.
        written: The node's own file in the registry; empty if it could not write.
    """

    problems: tuple[str, ...]
    written: str = ""


def require_writable(registry_root: str) -> None:
    """Write a small file to the registry and remove it: else training would find out at its end.

    Args:
        registry_root: A path or a URL.

    Raises:
        ConfigError: The registry cannot be written.
    """
    registry, marker = _Storage(registry_root), _new_marker()
    try:
        _write_marker(registry, registry_root, marker)
    finally:
        registry.remove(marker)


def check_nodes(sample: Path, registry_root: str, *, deadline_s: float = 8.0) -> list[str]:
    """Check, on every node of the joined cluster that has CPUs, whether trainers can work there.

    Nothing is checked if this machine is the only node. A node that does not answer, such as one that died a moment
    ago and is not noticed yet, is reported and does not prevent training on the others.

    Args:
        sample: A file of the data set.
        registry_root: The registry, an absolute path or a URL.
        deadline_s: How long to wait for the answers of nodes.

    Returns:
        The nodes that did not answer.

    Raises:
        ConfigError: A node cannot read the file, has another registry or other packages, or no node answers.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
    if set(nodes) <= {ray.get_runtime_context().get_node_id()}:
        return []
    registry, marker = _Storage(registry_root), _new_marker()
    try:
        _write_marker(registry, registry_root, marker)
        answers = _ask(nodes, sample, registry_root, marker, deadline_s)
        problems = [f"{_name(nodes[node])} {text}" for node, answer in answers.items() for text in answer.problems]
        problems += [
            f"{_name(nodes[node])} writes to another registry: {_other_registry(registry_root)}"
            for node, answer in answers.items()
            if answer.written and not registry.has(answer.written, marker)
        ]
    finally:
        registry.remove(marker, *(f"{marker}-{node}" for node in nodes))
    silent = [_name(nodes[node]) for node in nodes if node not in answers]
    if problems:
        raise ConfigError(f"nothing is trained: {'; '.join(problems)}")
    if not answers:
        raise ConfigError(
            f"no node of the cluster answered within {deadline_s:.0f} s: {', '.join(silent)}; look at `ray status`"
        )
    return silent


def _new_marker() -> str:
    return f".preflight-{uuid.uuid4().hex}"


def _write_marker(registry: "_Storage", root: str, marker: str) -> None:
    try:
        registry.write(marker, marker)
    except Exception as error:  # each storage has its own exceptions
        raise ConfigError(
            f"the registry {root} cannot be written here: {one_line(error)}; give this user the rights, or name "
            "another with --registry"
        ) from error


def _ask(
    nodes: dict[str, dict[str, Any]], sample: Path, registry_root: str, marker: str, deadline_s: float
) -> dict[str, _Answer]:
    """Run the check on all nodes at once; those that do not answer in time are left out."""
    remote = ray.remote(_check_node)
    asked = {
        remote.options(
            num_cpus=0,  # waits for no other work
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(sample, registry_root, marker, f"{marker}-{node}", _versions()): node
        for node in nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=deadline_s)
    answers: dict[str, _Answer] = {}
    for reference in answered:
        try:
            answers[asked[reference]] = ray.get(reference)
        except RayTaskError as error:
            answers[asked[reference]] = _Answer((f"cannot run flawstream: {one_line(error.cause or error)}",))
        except RayError:  # the node or its process died
            _log.info("%s died during the check", _name(nodes[asked[reference]]))
    for reference, node in asked.items():
        if node not in answers:
            ray.cancel(reference, force=True)
    return answers


def _check_node(sample: Path, registry_root: str, marker: str, own: str, versions: dict[str, str]) -> _Answer:
    """Check the node that this runs on."""
    problems = [
        f"has {name} {here}, and the driver has {versions[name]}: install the same on all nodes"
        for name, here in _versions().items()
        if here != versions[name]
    ]
    try:
        read_file(sample)
    except (OSError, FlawstreamError) as error:
        problems.append(
            f"cannot read {sample}: {one_line(error)}; give every node the data set under the same path, or use a URL"
        )
    registry = _Storage(registry_root)
    try:
        if not registry.has(marker, marker):
            problems.append(f"has another registry: {_other_registry(registry_root)}")
            return _Answer(tuple(problems))
        registry.write(own, marker)
    except Exception as error:  # noqa: BLE001 - each storage has its own exceptions
        problems.append(f"cannot write to the registry {registry_root}: {one_line(error)}; give it the rights")
        return _Answer(tuple(problems))
    return _Answer(tuple(problems), own)


class _Storage:
    """Small files in the root of the registry, without a cache of listings."""

    def __init__(self, root: str) -> None:
        self._folder = Location.of(root)

    def write(self, name: str, text: str) -> None:
        storage.write_file(self._folder / name, text.encode())

    def has(self, name: str, text: str) -> bool:
        return storage.read_file(self._folder / name) == text.encode()

    def remove(self, *names: str) -> None:
        for name in names:
            try:
                storage.remove_file(self._folder / name)
            except Exception as error:  # noqa: BLE001 - a file left there is no version and harms nobody
                _log.warning("%s cannot be removed: %s", (self._folder / name).url, error)


def _versions() -> dict[str, str]:
    return {"Python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _other_registry(root: str) -> str:
    return (
        f"{root} is not the same storage there; mount one shared folder on all nodes, or use a URL such as s3://models"
    )


def _name(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeName']}, {node['NodeID'][:8]})"
