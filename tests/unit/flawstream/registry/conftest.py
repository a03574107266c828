"""Registries in a folder and in memory."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from helpers.registries import FILES, make_manifest

from flawstream.registry.registry import Registry


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "models[1]")  # brackets are a wildcard to some of fsspec's calls
        return
    name = uuid.uuid4().hex
    yield f"memory://{name}/models"
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


@pytest.fixture
def registry(root: str) -> Registry:
    made = Registry(root)
    made.write(make_manifest(), FILES)
    return made
