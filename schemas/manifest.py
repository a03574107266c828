"""The manifest of a model version: written by training beside the weights, loaded by serving."""

from typing import Literal, Self

from pydantic import AliasChoices, AwareDatetime, BaseModel, ConfigDict, Field

from schemas.errors import RegistryError
from schemas.messages import Category
from schemas.settings import BackboneArithmetic, BitDepth, ModelSettings, Resize

MANIFEST_FORMAT = 5
"""Raised when fields are added that older programs do not know. Older formats are read: 2 calibrated int8 apart, 3 has
trials of any arithmetic, 4 records threads, device and the digest of the work, 5 has `bit_depth`."""

Arithmetic = Literal["float32", "float16", "bfloat16", "int8"]
"""In what an engine computes convolutions. Scores of two arithmetics differ: each has its own thresholds. Versions that
were calibrated in bfloat16, by older releases, are read and no longer served."""

Device = Literal["cpu", "cuda"]
"""What kind of device trained a version. Weights of the two differ in their last bits."""

Normalisation = Literal["statistics", "layer_norm", "none"]
"""How features are normalised before each flow: `flawstream.fastflow.normalisation`."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BackboneSpec(_Part):
    """The frozen network whose features a flow was trained on. Versions of one `identity` share it when served.

    Attributes:
        name: timm's name.
        weights: Their source: `package`, `timm`, `anomalib` (a file beside the version), or a file's name.
        weights_sha256: Digest of the tensors that are used, in order.
        strides: Stride of each scale in pixels, by which stages are chosen.
        channels: Channels of each scale.
        input_size: Side in pixels.
        mean: Per colour channel, of pixels in [0, 1].
        std: Per colour channel, of pixels in [0, 1].
        blocks: Blocks by index from 0, one a scale, where they are chosen in place of stages.
        resize: How images are resized to the input size.
        arithmetic: In what the network computes: what the flow was trained on, and thresholds were set on.
    """

    name: str
    weights: str
    weights_sha256: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    blocks: tuple[int, ...] = ()
    resize: Resize = "area"
    arithmetic: BackboneArithmetic = "float32"

    @property
    def identity(self) -> tuple[object, ...]:
        """Return what distinguishes backbones: network, input size, resize, layers, weights and arithmetic."""
        layers = self.strides, self.blocks
        return self.name, self.input_size, self.resize, *layers, self.weights_sha256, self.arithmetic

    @property
    def summary(self) -> str:
        """Describe `identity` in words."""
        size = f"{self.input_size} px (resize {self.resize})"
        arithmetic = "" if self.arithmetic == "float32" else f" in {self.arithmetic}"
        return f"{self.name} at {size} with {self.layers} and weights {self.weights_sha256[:12]}{arithmetic}"

    @property
    def layers(self) -> str:
        """Describe in words which layers compute the features."""
        kind, chosen = ("blocks", self.blocks) if self.blocks else ("strides", self.strides)
        return f"{kind} {', '.join(map(str, chosen))}"

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Return the side of each scale's feature map."""
        return tuple(self.input_size // stride for stride in self.strides)

    @property
    def feature_shapes(self) -> list[tuple[int, int, int]]:
        """Return (channels, height, width) of each scale's features."""
        return [(count, side, side) for count, side in zip(self.channels, self.grid_sizes, strict=True)]


class FlowSpec(_Part):
    """The shape of the flows, one a scale, and the normalisation before them."""

    steps: int
    hidden_ratio: float
    conv3x3_only: bool
    clamp: float
    normalisation: Normalisation = "statistics"

    @classmethod
    def of(cls, settings: ModelSettings) -> Self:
        """Make the spec from training's settings."""
        return cls(
            steps=settings.flow_steps,
            hidden_ratio=settings.hidden_ratio,
            conv3x3_only=settings.conv3x3_only,
            clamp=settings.clamp,
        )


class Calibration(_Part):
    """Thresholds and scores from held-out normal images, none of which trained the flow.

    Attributes:
        arithmetic: That of the engine which scored them.
        top_fraction: The image score is the mean of this share of the map's highest values; 0 means the maximum.
        scores: Image scores, ascending.
        false_alarm_rate: The rate that was asked for.
        threshold: An image score above it is anomalous.
        pixel_threshold: A map value above it is an anomalous pixel.
    """

    arithmetic: Arithmetic = "float32"
    top_fraction: float
    scores: tuple[float, ...] = Field(min_length=1)
    false_alarm_rate: float
    threshold: float
    pixel_threshold: float


class DefectMetrics(_Part):
    """Metrics of the version on one kind of defect.

    Attributes:
        defect: The kind.
        images: Test images that show it.
        image_auroc: AUROC of these images against all normal ones; absent without normal ones.
        recall: Share of these images above the threshold.
        intervals: As in `EvaluationMetrics`.
    """

    defect: str
    images: int
    image_auroc: float | None = None
    recall: float | None = None
    intervals: dict[str, tuple[float, float]] = {}


class EvaluationMetrics(_Part):
    """Metrics of the version on the test folder, if there was one. All are shares in [0, 1].

    Attributes:
        image_auroc: Area under the ROC curve of image scores; absent without both classes, like the next two.
        average_precision: Mean precision over the defective images, each at its own score.
        f1_max: The highest F1 that any threshold reaches on these images.
        pixel_auroc: AUROC over pixels; absent without masks.
        aupro: Area under the curve of per-region overlap up to a false positive rate of 0.3, over 0.3; absent without
            masks.
        false_alarm_rate: Share of normal test images above the threshold.
        recall: Share of defective test images above the threshold.
        normal_images: Test images.
        anomalous_images: Test images.
        intervals: 95 % confidence intervals, (low, high), by the name of the metric; some metrics have none.
        defects: By kind of defect, where kinds are known.
    """

    image_auroc: float | None = None
    average_precision: float | None = None
    f1_max: float | None = None
    pixel_auroc: float | None = None
    aupro: float | None = None
    false_alarm_rate: float | None = None
    recall: float | None = None
    normal_images: int = 0
    anomalous_images: int = 0
    intervals: dict[str, tuple[float, float]] = {}
    defects: tuple[DefectMetrics, ...] = ()


class ArithmeticTrial(_Part):
    """A version judged in a faster arithmetic beside float32, on the same images. None of them set int8 ranges.

    Attributes:
        arithmetic: The faster one.
        scope: What was computed in it: `flows`, the convolutions of the flows, or `version`, the backbone's as well.
            Older manifests may have a `version` in int8: it is no longer served so, but in float32.
        kept: Whether it does no harm: it then serves where the hardware has it. An int8 graph is a file beside the
            weights.
        normal_images: Held-out normal images that were scored.
        rank_correlation: Spearman's, between their scores in both arithmetics.
        alarms: Share of them above float32's threshold in the faster one: what one threshold for both would do.
        alarms_float32: Share of them above that threshold in float32.
        changed_verdicts: How many of them get another verdict, each arithmetic judged by its own threshold.
        lost_defects: How many defective test images float32 finds and the faster one does not, each by its own
            threshold; absent without defective test images.
        image_auroc: AUROC of test images in the faster one; absent without both classes, like the next.
        image_auroc_float32: The same in float32.
        calibration: Thresholds and scores in the faster one. Absent in format 1: the version is not served in int8.
        metrics: Metrics of the version on test images in the faster one.
    """

    arithmetic: Literal["int8", "float16"] = "int8"
    scope: Literal["flows", "version"]
    kept: bool
    normal_images: int
    rank_correlation: float
    alarms: float
    alarms_float32: float
    changed_verdicts: int | None = None
    lost_defects: int | None = None
    image_auroc: float | None = None
    image_auroc_float32: float | None = None
    calibration: Calibration | None = None
    metrics: EvaluationMetrics | None = None


class TrainingRecord(_Part):
    """The data and settings that the version was trained with.

    Attributes:
        dataset_sha256: Digest of the images' contents and roles.
        train_images: Number of images that trained the flow.
        calibration_images: Number of held-out images that set the thresholds.
        epochs: As in the settings, like the fields after it.
        batch_size: Images in a step.
        learning_rate: Peak.
        weight_decay: AdamW's.
        clip_norm: Largest norm of a gradient.
        seed: Seed of all random numbers.
        final_loss: Mean loss of the last epoch, nats per value.
        duration_s: Of the whole training.
        threads: CPU threads that trained it; absent before format 4.
        device: Kind of device that trained it; absent before format 4.
        work_sha256: Digest of everything that the version depends on (`training.work`); absent before format 4.
    """

    dataset_sha256: str
    train_images: int
    calibration_images: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    seed: int
    final_loss: float
    duration_s: float
    threads: int | None = None
    device: Device | None = None
    work_sha256: str | None = None


class ImportRecord(_Part):
    """Origin of an imported version. Its checkpoint does not say how it was trained, or on what.

    Attributes:
        source: The program that trained it.
        checkpoint_sha256: Digest of the file.
        dataset_sha256: Digest of the images that calibrated it.
        calibration_images: Their number.
        train_images: Unknown.
        seed: Unknown.
        duration_s: Duration of the import.
    """

    source: Literal["anomalib"]
    checkpoint_sha256: str
    dataset_sha256: str
    calibration_images: int
    train_images: None = None
    seed: None = None
    duration_s: float


class ModelManifest(_Part):
    """One immutable model version. `calibration` and `metrics` are in float32; each trial has its own.

    `bit_depth` is how many bits are read of files with 16; before format 5 all.
    """

    format: int = MANIFEST_FORMAT
    category: Category
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    created_at: AwareDatetime
    backbone: BackboneSpec
    flow: FlowSpec
    bit_depth: BitDepth = 16
    calibration: Calibration
    metrics: EvaluationMetrics = EvaluationMetrics()
    training: TrainingRecord | ImportRecord
    trials: tuple[ArithmeticTrial, ...] = Field((), validation_alias=AliasChoices("trials", "int8"))
    libraries: dict[str, str]
    files: dict[str, str] = Field(description="SHA-256 of every file beside the manifest, by name.")

    @property
    def model(self) -> str:
        """Return `category@version`, as in results."""
        return f"{self.category}@{self.version}"

    def trial_in(self, arithmetic: Arithmetic | None) -> ArithmeticTrial | None:
        """Return the trial that lets the version serve in an arithmetic, if any."""
        return next((trial for trial in self._kept_trials if trial.arithmetic == arithmetic), None)

    @property
    def _kept_trials(self) -> tuple[ArithmeticTrial, ...]:
        served_int8 = (trial for trial in self.trials if (trial.arithmetic, trial.scope) != ("int8", "version"))
        return tuple(trial for trial in served_int8 if trial.kept and trial.calibration is not None)

    def calibration_in(self, arithmetic: Arithmetic) -> Calibration:
        """Return the calibration of an arithmetic.

        Raises:
            RegistryError: The version was not calibrated in it: scores of one arithmetic have no threshold in another.
        """
        trial = self.trial_in(arithmetic)
        if trial is not None and trial.calibration is not None:
            return trial.calibration
        if self.calibration.arithmetic != arithmetic:
            raise RegistryError(
                f"{self.model} was calibrated in {self.calibration.arithmetic} and this engine computes in "
                f"{arithmetic}, where its threshold does not hold; train it again"
            )
        return self.calibration

    @property
    def serving_metrics(self) -> EvaluationMetrics:
        """Return the metrics in the arithmetic that serves the version where it was trained."""
        return next((trial.metrics for trial in self._kept_trials if trial.metrics is not None), self.metrics)
