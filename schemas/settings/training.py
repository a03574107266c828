"""The training recipe."""

from pydantic import Field

from schemas.settings.section import Fraction, Section


class TrainingSettings(Section):
    """The recipe: one set of defaults for all categories."""

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
    seed: int = Field(0, ge=0, description="Seed of the split, the permutations, the weights and the order of images.")
    int8: bool = Field(
        True,  # noqa: FBT003
        description="Make an int8 graph of each version, on CPUs that have instructions for it, and keep it where it "
        "scores as float32 does.",
    )
    num_gpus: float = Field(
        0.0, ge=0, description="GPUs, or a share of one, that Ray reserves for a category in training."
    )
