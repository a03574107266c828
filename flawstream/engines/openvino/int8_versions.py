"""Versions whose flows an engine on a CPU runs in int8: those whose manifest proves that it does no harm."""

from collections.abc import Mapping

import numpy as np

from flawstream.engines.openvino.int8_graph import CONSTANTS_FILE, GRAPH_FILE, Int8Flows
from flawstream.engines.protocol import Read
from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import BackboneSpec, ModelManifest


def load_int8(head: FastFlowHead, manifest: ModelManifest | None, read: Read) -> Int8Flows | None:
    """Make a version's int8 graph ready and run it once; none where it has none that may serve.

    Raises:
        RegistryError: The graph is missing or damaged.
        RuntimeError: It cannot be compiled.
    """
    if manifest is None or manifest.trial_in("int8") is None:
        return None
    return open_int8(head, {name: read(name) for name in (GRAPH_FILE, CONSTANTS_FILE)}, manifest.backbone)


def open_int8(head: FastFlowHead, files: Mapping[str, bytes], spec: BackboneSpec) -> Int8Flows:
    """Compile an int8 graph and run it once. Every engine on a CPU takes it as a head.

    Raises:
        RuntimeError: It cannot be compiled.
    """
    flows = Int8Flows(head, files)
    features = [np.zeros((2, *shape), np.float32) for shape in spec.feature_shapes]
    flows(features)  # a batch and a single image run in graphs of their own
    flows([scale[:1] for scale in features])
    return flows
