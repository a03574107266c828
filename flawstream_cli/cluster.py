"""Joining a Ray cluster or starting one on this machine: once a process, for training and for serving alike."""

import atexit
import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from flawstream_cli.terminal import busy
from schemas.errors import ConfigError, one_line

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # without it Ray warns of a default that will change
}

_KNOCK_S = 5.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the program runs.

    Attributes:
        dashboard_url: The Ray dashboard; empty where it is off.
        head: Address `host:port` of the cluster's head (its GCS).
        cpus: In the whole cluster.
        gpus: In the whole cluster.
    """

    dashboard_url: str
    head: str
    cpus: float
    gpus: float


def connect(address: str | None = None) -> Cluster:
    """Join the cluster at `address`, or start one on this machine.

    The dashboard of one started is bound to loopback; Ray's own ports listen on all interfaces.

    Args:
        address: A cluster's address, `auto` for the one that runs here already; None or `local` starts one.

    Raises:
        ConfigError: No cluster answers at the address, it is of another of Ray's protocols, or this machine is too busy
            to start one.
    """
    address = None if address == "local" else address
    _refuse_other_protocol(address or "")
    if not ray.is_initialized():
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        local = {} if address else {"include_dashboard": True, "_node_ip_address": "127.0.0.1"}
        try:
            if address:
                knock(address)
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except (OSError, ValueError) as error:
            if address is None:
                raise ConfigError(
                    f"Ray did not start on this machine: {one_line(error)}; its files go to "
                    f"{tempfile.gettempdir()}/ray: this user must be able to write there, and the path must be short; "
                    "set TMPDIR to another folder"
                ) from error
            raise ConfigError(
                f"no Ray cluster answers at {address} ({one_line(error)}); start one with `ray start --head`, or leave "
                "the address out to run on this machine alone; if one runs there, it may ask for a token: set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that it was started with"
            ) from error
        except Exception as error:
            if type(error) is not Exception:  # the bare class is how Ray says that a start took too long
                raise
            raise ConfigError(
                f"Ray did not start ({error}); the machine is busy or short of memory: try again when it is less so"
            ) from error
    context = ray.get_runtime_context()
    url = context.worker.node.webui_url if address is None else ""
    resources = ray.cluster_resources()
    return Cluster(
        f"http://{url}" if url else "", context.gcs_address, resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    )


def _refuse_other_protocol(address: str) -> None:
    """Refuse addresses of Ray Client and of the dashboard, at which `ray.init` would fail or wait."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"{address} is an address of Ray Client, which is not supported: on a machine of the cluster give the "
            "address of the head itself (HOST:6379, or auto), from elsewhere submit a job with `flawstream train "
            "--submit http://HOST:8265`"
        )
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} is the address of a Ray dashboard, to which jobs are submitted: `flawstream train --submit "
            f"{address}`; --ray and RAY_ADDRESS name the head itself (HOST:6379)"
        )


def knock(address: str, timeout_s: float = _KNOCK_S) -> None:
    """Find out within seconds whether anybody listens at `host:port`; Ray tries for many minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends. From a head that is lost Ray would wait for an answer."""
    if ray.is_initialized():
        try:
            knock(ray.get_runtime_context().gcs_address)
        except OSError:
            atexit.unregister(ray.shutdown)
            return
    ray.shutdown()


@contextlib.contextmanager
def on_cluster(address: str | None) -> Iterator[Cluster]:
    """Connect to the Ray cluster at an address, or start one on this machine; disconnect when the context ends.

    Raises:
        ConfigError: No cluster answers at the address.
    """
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with busy("starting Ray" if address is None else f"connecting to Ray at {address}"):
            connected = connect(address)
        with contextlib.suppress(ValueError):  # not in the main thread, where Ray has set no handler either
            signal.signal(signal.SIGTERM, handler)  # Ray's own raises SystemExit wherever the program is
        yield connected
    finally:
        disconnect()
