"""The board of training: running jobs, their speed, and their loss."""

from flawstream.telemetry import metrics as m
from k8s.boards.panels import IMAGES_PER_S, Board, Query, choice, lines, number
from k8s.boards.queries import counted, per_second, select

_CHOSEN = 'category=~"$category"'

BOARD = Board(
    uid="flawstream-training",
    title="flawstream: training",
    description="Running and finished training jobs, images a second by stage, epoch and loss.",
    variables=[
        choice("namespace", "Namespace", f"label_values({m.TRAINING_IMAGES.name}, namespace)", several=True),
        choice("category", "Category", f"label_values({select(m.TRAINING_IMAGES)}, category)", several=True),
    ],
    rows=[
        (
            "Jobs",
            [
                number(
                    "Running",
                    "none",
                    "Categories whose flow is being trained. 0 while a job runs: it computes features, or waits for a "
                    "node; see the job in Ray's dashboard.",
                    Query(f"count({select(m.TRAINING_EPOCH, _CHOSEN)} > 0) or vector(0)", "running"),
                    width=6,
                ),
                number(
                    "Done, last day",
                    "none",
                    "Categories whose version was published within 24 hours.",
                    Query(counted(m.TRAINING_JOBS, matchers='outcome="done"', window="1d"), "done"),
                    width=6,
                ),
                number(
                    "Failed, last day",
                    "none",
                    "Categories whose training failed within 24 hours; the job's log has the error.",
                    Query(counted(m.TRAINING_JOBS, matchers='outcome="failed"', window="1d"), "failed"),
                    runbook="FlawstreamTrainingFails",
                    limit=1,
                    width=6,
                ),
                number(
                    "Images",
                    IMAGES_PER_S,
                    "Images processed, all stages together. 0 while jobs run: they hang or wait for a node.",
                    Query(per_second(m.TRAINING_IMAGES, matchers=_CHOSEN), "images"),
                    width=6,
                ),
            ],
        ),
        (
            "Speed",
            [
                lines(
                    "Images by stage",
                    IMAGES_PER_S,
                    "`features`: the backbone, once an image. `training`: the flow, every epoch. Slow features: more "
                    "CPUs. Slow training: more CPUs or a GPU for each job.",
                    Query(per_second(m.TRAINING_IMAGES, "stage", _CHOSEN), "{{stage}}"),
                    width=12,
                ),
                lines(
                    "Finished jobs",
                    "none",
                    "Categories trained or failed in each interval.",
                    Query(counted(m.TRAINING_JOBS, "outcome"), "{{outcome}}"),
                    runbook="FlawstreamTrainingFails",
                    bars=True,
                    width=12,
                ),
            ],
        ),
        (
            "Progress",
            [
                lines(
                    "Epoch",
                    "none",
                    "Current epoch of each category; 0 when finished. A flat line: the job hangs or waits for a node.",
                    Query(f"max by (category) ({select(m.TRAINING_EPOCH, _CHOSEN)})", "{{category}}"),
                    width=12,
                ),
                lines(
                    "Loss",
                    "none",
                    "Mean of the epoch so far, nats per value. It should fall, also below 0. If it rises: too few or "
                    "mixed images (`flawstream datasets check`), or too high a learning rate.",
                    Query(f"max by (category) ({select(m.TRAINING_LOSS, _CHOSEN)})", "{{category}}"),
                    least=None,
                    width=12,
                ),
                lines(
                    "Speed of each flow",
                    IMAGES_PER_S,
                    "Images a second that each category's flow is trained on, mean of its run so far; 0 when finished.",
                    Query(f"max by (category) ({select(m.TRAINING_SPEED, _CHOSEN)})", "{{category}}"),
                    width=12,
                ),
                lines(
                    "Time left",
                    "s",
                    "Time until each category's flow is trained, at its speed so far; calibration and tests follow.",
                    Query(f"max by (category) ({select(m.TRAINING_LEFT, _CHOSEN)})", "{{category}}"),
                    width=12,
                ),
            ],
        ),
    ],
)
