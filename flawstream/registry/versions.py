"""The backbone of a model version, from where the version has it: beside its flow, a package, timm or a file."""

import safetensors.torch

from flawstream.fastflow.backbone import Backbone, load_trained_backbone
from flawstream.registry.registry import Registry
from schemas.manifest import ModelManifest
from schemas.settings import ModelSettings

BACKBONE_FILE = "backbone.safetensors"
"""What a version has beside its flow where its backbone's weights came with it, as an imported one's do."""


def backbone_file(backbone: Backbone) -> bytes:
    """Write the tensors of a backbone that are used, as `open_backbone` reads them."""
    return safetensors.torch.save({name: t.contiguous() for name, t in backbone.network.state_dict().items()})


def open_backbone(registry: Registry, manifest: ModelManifest, settings: ModelSettings) -> Backbone:
    """Load the backbone that a version runs on.

    Args:
        registry: Where the version is.
        manifest: The version's.
        settings: Its `weights` may name a file where the version has none beside it.

    Raises:
        ConfigError: The installed timm has no such network.
        WeightsError: The weights cannot be had, or are not those of training.
        RegistryError: The file beside the version is missing or damaged.
    """
    if BACKBONE_FILE not in manifest.files:
        return load_trained_backbone(manifest.backbone, settings)
    tensors = safetensors.torch.load(registry.read_file(manifest, BACKBONE_FILE))
    return load_trained_backbone(manifest.backbone, settings, tensors)
