"""Versions that an engine on a CPU judges in int8: those whose manifest proves that it does no harm.

Shape legend: B images, S side of an image in pixels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flawstream.engines.openvino.int8_graph import CONSTANTS_FILE, GRAPH_FILE, Int8Flows, Int8Graph
from flawstream.engines.protocol import Read, empty_grids, fill_rows
from flawstream.fastflow.head import FastFlowHead
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.manifest import BackboneSpec, ModelManifest

Grids = list[NDArray[np.float32]]
Heads = Sequence[tuple[Any, NDArray[np.int64]]]

Int8Version = Int8Graph | Int8Flows
"""A graph from pixels to grids, with a backbone of its own; or flows behind the engine's backbone."""


def load_int8(head: FastFlowHead, manifest: ModelManifest | None, read: Read) -> Int8Version | None:
    """Make a version's int8 graph ready and run it once; none where it has none.

    Raises:
        RegistryError: The graph is missing or damaged.
        RuntimeError: It cannot be compiled.
    """
    if manifest is None or manifest.int8_scope is None:
        return None
    files = {name: read(name) for name in (GRAPH_FILE, CONSTANTS_FILE)}
    return open_int8(manifest.int8_scope, head, files, manifest.backbone)


def open_int8(
    scope: Literal["flows", "version"], head: FastFlowHead, files: Mapping[str, bytes], spec: BackboneSpec
) -> Int8Version:
    """Compile an int8 graph and run it once. Every engine on a CPU takes it as a head.

    Raises:
        RuntimeError: It cannot be compiled.
    """
    form = PixelForm.of(spec)
    count = 2  # once side by side, and once alone
    if scope == "version":
        graph = Int8Graph(files)
        pixels = np.zeros((count, *form.shape), form.dtype)
        graph(pixels)
        graph(pixels[:1])
        return graph
    flows = Int8Flows(head, files)
    features = [np.zeros((count, *shape), np.float32) for shape in spec.feature_shapes]
    flows(features)
    flows([scale[:1] for scale in features])
    return flows


def detect_apart(images: Pixels, heads: Heads, spec: BackboneSpec, judge: Callable[[Pixels, Heads], Grids]) -> Grids:
    """Have versions with a backbone of their own judge their rows, and `judge` all others; see `Engine.detect`."""
    whole = [(graph, rows) for graph, rows in heads if isinstance(graph, Int8Graph)]
    if not whole:
        return judge(images, heads)
    if len(heads) == 1:
        return whole[0][0](images)
    grids = empty_grids(len(images), spec)
    done = [(rows, graph(images[rows])) for graph, rows in whole]
    others = [(head, rows) for head, rows in heads if not isinstance(head, Int8Graph)]
    if others:
        taken = np.concatenate([rows for _, rows in others])
        ends = np.cumsum([len(rows) for _, rows in others])
        renumbered = [
            (head, np.arange(end - len(rows), end)) for (head, rows), end in zip(others, ends.tolist(), strict=True)
        ]
        done.append((taken, judge(images[taken], renumbered)))
    for rows, parts in done:
        fill_rows(grids, rows, parts)
    return grids
