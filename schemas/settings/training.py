"""The training recipe, and what Ray reserves for it."""

from typing import Literal

from pydantic import Field

from schemas.settings.model import BitDepth
from schemas.settings.section import Fraction, Section

PLACEMENT = frozenset({"num_gpus", "categories_per_gpu", "device", "labels", "memory_gb", "wait_for_nodes"})
"""The fields that say where training runs; all others are the recipe, on which weights and thresholds depend."""


class TrainingSettings(Section):
    """The recipe: one set of defaults for all categories; and the placement on a Ray cluster."""

    epochs: int = Field(
        20, ge=1, description="Passes over the training images. The last epoch is kept, never the best."
    )
    batch_size: int = Field(16, ge=1, description="Images in a step.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak of the one-cycle schedule.")
    weight_decay: float = Field(1e-5, ge=0, description="AdamW's decoupled decay.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a gradient.")
    calibration_fraction: Fraction = Field(
        0.2, description="Share of the normal images that never trains the flow and sets thresholds and p-values."
    )
    false_alarm_rate: Fraction = Field(0.05, description="Share of normal parts that may be called anomalous.")
    bit_depths: dict[str, BitDepth] = Field(
        {},
        description="By category, how many bits its camera fills in files of 16: 8, 10, 12, 14 or 16. For the others "
        "the fewest that hold all levels of their images. Kept in the version's manifest.",
    )
    seed: int = Field(0, ge=0, description="Seed of the split, the permutations, the weights and the order of images.")
    int8: bool = Field(
        True,  # noqa: FBT003
        description="Make an int8 graph of each version, on CPUs that have instructions for it, and keep it where it "
        "scores as float32 does.",
    )
    threads: int = Field(
        1,
        ge=1,
        description="CPU threads that train a category, and CPUs that Ray reserves for it. Weights depend on it in "
        "their last bits, so that it is part of the recipe and never follows the cluster.",
    )
    device: Literal["auto", "cpu", "gpu", "both"] = Field(
        "auto",
        description="`auto`: GPUs if the cluster has any, else CPUs; `both`: nodes without a GPU train beside those "
        "with one. Weights of the two differ: the manifest says which a version was trained on.",
    )
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs, or a share of one, that Ray reserves for a trainer; 0: one, where GPUs train."
    )
    categories_per_gpu: int = Field(
        8,
        ge=1,
        description="Categories that train together on a GPU, at most: fewer where its memory is short, where "
        "`num_gpus` is a share, and where other GPUs would have none. On CPUs each category has a trainer of its own.",
    )
    memory_gb: float = Field(
        1.0,
        ge=0,
        description="Memory that Ray reserves for a category, or for those that train together on a GPU, 10^9 bytes; "
        "0 reserves none.",
    )
    labels: dict[str, str] = Field(
        {}, description="Only nodes with these labels train: Ray's label selector, by key, for example `{zone: a}`."
    )
    wait_for_nodes: bool = Field(
        False,  # noqa: FBT003
        description="Wait for a node that can train instead of refusing; for clusters with an autoscaler.",
    )
