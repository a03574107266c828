"""A node of a cluster, as far as one can be had without a container runtime: it starts the containers of a chart.

Each sees the image's root read-only, what its pod mounts, and its own environment, as the user that the pod names; all
share a network of their own, which leads nowhere, and names of Services lead to it. Knows no scheduler and no probes.
"""

import base64
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from helpers.chart.rendered import Body, Pod
from helpers.places import ROOT

DOCKERFILE = ROOT / "k8s" / "docker" / "Dockerfile"
ENDS = ("-head-svc", "-serve-svc")
"""What KubeRay puts behind a RayService's name."""

_LOCAL = "127.0.0.1"


def image_environment() -> dict[str, str]:
    """Read what the Dockerfile's last stages set."""
    text = DOCKERFILE.read_text().partition(" AS runtime")[2].partition(" AS cuda")[0].replace("\\\n", " ")
    found: dict[str, str] = {}
    for line in re.findall(r"(?m)^ENV (.+)$", text):
        for name, value in re.findall(r"(\w+)=(\S+)", line):
            found[name] = value.replace("${PATH}", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return found


class Node:
    """Where containers run, until it is left.

    Args:
        root: The image's file tree.
        folder: For what containers write.
        documents: The rendered chart: ConfigMaps, Secrets and Services come from there.
        claims: The folder of each PersistentVolumeClaim.
    """

    def __init__(self, root: Path, folder: Path, documents: Sequence[Body], claims: Mapping[str, Path]) -> None:
        self._root = root
        self._folder = folder
        self._claims = claims
        self._objects = {(d["kind"], d["metadata"]["name"]): d for d in documents}
        services = [name for kind, name in self._objects if kind == "Service"]
        services += [f"{name}{end}" for kind, name in self._objects for end in ENDS if kind == "RayService"]
        self._hosts = folder / "hosts"
        self._hosts.write_text(f"{_LOCAL} localhost {socket.gethostname()} {' '.join(services)}\n")
        self._number = 0
        self._started: list[subprocess.Popen[str]] = []
        self._init: subprocess.Popen[str] | None = None

    @contextmanager
    def up(self) -> Iterator["Node"]:
        """Have the node; all its processes end with it."""
        init = "ip link set lo up; echo up; exec sleep infinity"
        line = ["unshare", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", init]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as self._init:  # noqa: S603 - as it stands here
            try:
                assert self._init.stdout is not None
                assert self._init.stdout.readline() == "up\n"
                yield self
            finally:
                self._init.kill()  # and with it all processes in there
                for process in self._started:
                    process.communicate()

    def start(
        self,
        pod: Pod,
        command: Sequence[str] = (),
        *,
        container: str = "",
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a container of a pod; its output goes to pipes, or to one file.

        Args:
            pod: Whose.
            command: In place of its own.
            container: Which; absent: the only one, or the first.
            environment: What KubeRay would add.
            log: Where both outputs go.
        """
        spec = next(c for c in pod.spec["containers"] if container in {"", c["name"]})
        self._number += 1
        view = self._folder / f"view-{self._number}"
        view.mkdir()
        security = pod.spec["securityContext"]
        user, group = security["runAsUser"], security["runAsGroup"]
        mounts = [f"mount --bind {self._root} {view}"]
        mounts += [f"mount -t proc proc {view}/proc", f"mount --rbind /dev {view}/dev"]
        mounts += self._bound(self._hosts, "/etc/hosts", view, read_only=True)
        for mount in spec.get("volumeMounts", []):
            source = self._volume(pod, mount["name"], (user, security["fsGroup"]))
            if "subPath" in mount:
                source /= mount["subPath"]
            mounts += self._bound(source, mount["mountPath"], view, read_only=mount.get("readOnly", False))
        if spec["securityContext"]["readOnlyRootFilesystem"]:
            mounts.append(f"mount -o remount,bind,ro {view}")
        variables = image_environment() | dict(self._environment(spec)) | dict(environment or {})
        line = list(command) or spec.get("command") or ["flawstream", *spec["args"]]
        entered = ["chroot", f"--userspec={user}:{group}", f"--groups={security['fsGroup']}", str(view), "env", "-i"]
        entered += [f"{name}={value}" for name, value in variables.items()]
        entered += ["sh", "-c", 'cd /tmp && exec "$@"', "sh", *line]
        inside = ["nsenter", f"--target={self._pid()}", "--net", "--pid", "unshare", "--mount"]
        script = "\n".join([*mounts, 'exec "$@"'])
        with ExitStack() as stack:
            output = stack.enter_context(log.open("w")) if log else subprocess.PIPE
            process = subprocess.Popen(  # noqa: S603 - the chart's own commands
                [*inside, "sh", "-ec", script, "sh", *entered],
                stdout=output,
                stderr=subprocess.STDOUT if log else subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        self._started.append(process)
        return process

    def answers(self, pod: Pod, command: Sequence[str]) -> bool:
        """Tell whether a command ends well in a container of the pod, as a probe asks."""
        process = self.start(pod, command)
        process.communicate(timeout=60)
        return process.returncode == 0

    def run(self, pod: Pod, command: Sequence[str] = (), **how: Any) -> str:
        """Run a container to its end, and give its standard output.

        Raises:
            AssertionError: It ended with another code than 0.
        """
        process = self.start(pod, command, **how)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, f"{command or 'it'} ended with {process.returncode}\n{out}\n{err}"
        return out

    def stop(self, process: subprocess.Popen[str]) -> int:
        """End a container as a kubelet does, and give its exit code."""
        os.kill(_child(process), signal.SIGTERM)  # who was started is nsenter, which passes no signal on
        process.communicate(timeout=60)
        return process.returncode

    def _pid(self) -> int:
        assert self._init is not None
        return _child(self._init)

    def _bound(self, source: Path, target: str, view: Path, *, read_only: bool) -> list[str]:
        """Give the commands of a mount; its place is made in the root first, as a container runtime does."""
        place = self._root / target.lstrip("/")
        if source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        inside = f"{view}{target}"
        return [f"mount --bind {source} {inside}", *([f"mount -o remount,bind,ro {inside}"] if read_only else [])]

    def _volume(self, pod: Pod, name: str, owner: tuple[int, int]) -> Path:
        """Give a volume's folder, made as a kubelet makes it."""
        volumes: list[Body] = pod.spec["volumes"]
        volume: Body = next((v for v in volumes if v["name"] == name), {"name": name, "emptyDir": {}})
        if "persistentVolumeClaim" in volume:
            return self._claims[volume["persistentVolumeClaim"]["claimName"]]
        folder = self._folder / f"volume-{self._number}-{name}"
        folder.mkdir()
        if "emptyDir" in volume:
            folder.chmod(0o777)
        if "configMap" in volume:
            _write(folder, self._objects["ConfigMap", volume["configMap"]["name"]]["data"], 0o644)
        if "secret" in volume:
            data = self._secret(volume["secret"]["secretName"])
            items = {item["path"]: data[item["key"]] for item in volume["secret"].get("items", [])} or data
            _write(folder, items, volume["secret"]["defaultMode"], group=owner[1])
        return folder

    def _secret(self, name: str) -> dict[str, str]:
        return {key: base64.b64decode(value).decode() for key, value in self._objects["Secret", name]["data"].items()}

    def _environment(self, spec: Body) -> Iterator[tuple[str, str]]:
        for item in spec.get("env", []):
            reference = item.get("valueFrom", {}).get("secretKeyRef")
            yield item["name"], self._secret(reference["name"])[reference["key"]] if reference else item["value"]


def _child(process: subprocess.Popen[str]) -> int:
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def _write(folder: Path, files: Mapping[str, str], mode: int, group: int = 0) -> None:
    for name, text in files.items():
        path = folder / name
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, 0, group)
