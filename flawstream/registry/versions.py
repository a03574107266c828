"""Loading of the backbone of a model version: from the registry, a package, timm or a file."""

import safetensors.torch

from flawstream.fastflow.backbone import Backbone, load_trained_backbone
from flawstream.registry.registry import Registry
from schemas.manifest import ModelManifest
from schemas.settings import ModelSettings

BACKBONE_FILE = "backbone.safetensors"
"""The backbone's weights of an imported version, stored beside its head."""


def backbone_file(backbone: Backbone) -> bytes:
    """Serialise the tensors of a backbone for `open_backbone`."""
    return safetensors.torch.save({name: t.contiguous() for name, t in backbone.network.state_dict().items()})


def open_backbone(registry: Registry, manifest: ModelManifest, settings: ModelSettings) -> Backbone:
    """Load the backbone of a version.

    Args:
        registry: The registry that has the version.
        manifest: The version's manifest.
        settings: `weights` may name a file, if the registry has none for this version.

    Raises:
        ConfigError: The installed timm has no such network.
        WeightsError: The weights cannot be loaded, or are not those of training.
        RegistryError: The registry's file is missing or damaged.
    """
    if BACKBONE_FILE not in manifest.files:
        return load_trained_backbone(manifest.backbone, settings)
    tensors = safetensors.torch.load(registry.read_file(manifest, BACKBONE_FILE))
    return load_trained_backbone(manifest.backbone, settings, tensors)
