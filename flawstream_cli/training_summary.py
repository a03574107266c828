"""The summary of a training run: a table and messages, or one JSON document."""

from rich.table import Table

from flawstream.calibration import shortage_of
from flawstream_cli.terminal import out, print_json, print_message, table
from schemas.manifest import ModelManifest

_UNCHANGED_LISTED = 8


def report_run(
    manifests: list[ModelManifest],
    unchanged: list[ModelManifest],
    failures: dict[str, str],
    root: str,
    *,
    as_json: bool,
) -> None:
    """Print what a run has trained, what it left unchanged, and what failed.

    Args:
        manifests: The new versions.
        unchanged: Versions that were not trained again.
        failures: Errors by job.
        root: The registry.
        as_json: Whether standard output is one JSON document.
    """
    if as_json:
        trained = [m.model_dump(mode="json", exclude={"calibration"}) for m in manifests]
        print_json(
            {
                "trained": trained,
                "unchanged": [m.model for m in unchanged],
                "failed": failures,
                "warnings": shortage_warnings(manifests),
            }
        )
    elif manifests:
        out.print(training_table(manifests))
    if unchanged:
        listed = ", ".join(m.model for m in unchanged[:_UNCHANGED_LISTED])
        more = f" and {len(unchanged) - _UNCHANGED_LISTED} more" if len(unchanged) > _UNCHANGED_LISTED else ""
        print_message(f"unchanged: {listed}{more}: trained before on the same data and recipe; --again trains anew")
    if not as_json and (manifests or unchanged):
        print_message(f"registry: {root}")
        print_message(f"next:     flawstream serve --registry {root}")
    for name, reason in failures.items():
        print_message(f"{name} failed: {reason}", "red")


def training_table(manifests: list[ModelManifest]) -> Table:
    """Build a table of trained versions."""
    return table(
        "Trained",
        (
            "category",
            "version",
            "seed",
            "train",
            "calibrate",
            "test",
            "AUROC",
            "pixel AUROC",
            "AUPRO",
            "false alarms",
            "recall",
            "seconds",
        ),
        (
            (
                m.category,
                m.version,
                m.training.seed,
                m.training.train_images,
                m.training.calibration_images,
                measured.normal_images + measured.anomalous_images,
                measured.image_auroc,
                measured.pixel_auroc,
                measured.aupro,
                measured.false_alarm_rate,
                measured.recall,
                round(m.training.duration_s),
            )
            for m in manifests
            for measured in [m.serving_metrics]
        ),
    )


def shortage_warnings(manifests: list[ModelManifest]) -> dict[str, str]:
    """Return a warning for each model with too few held-out images for its false-alarm rate."""
    return {m.model: warning for m in manifests if (warning := shortage_of(m.calibration))}
