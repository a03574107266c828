"""The board of whoever trains: what is under way, how fast, and whether it learns."""

from flawstream.telemetry import metrics as m
from k8s.boards.panels import IMAGES_PER_S, Board, Query, choice, lines, number
from k8s.boards.queries import counted, per_second, select

_CHOSEN = 'category=~"$category"'

BOARD = Board(
    uid="flawstream-training",
    title="flawstream: training",
    description="Training jobs under way and ended, images a second by stage, epoch and loss.",
    variables=[
        choice("namespace", "Namespace", f"label_values({m.TRAINING_IMAGES.name}, namespace)", several=True),
        choice("category", "Category", f"label_values({select(m.TRAINING_IMAGES)}, category)", several=True),
    ],
    rows=[
        (
            "Jobs",
            [
                number(
                    "Under way",
                    "none",
                    "Categories in their epochs now. 0 with a job running: features are read, or it waits for a node; "
                    "see the job in Ray's dashboard.",
                    Query(f"count({select(m.TRAINING_EPOCH, _CHOSEN)} > 0) or vector(0)", "under way"),
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
                    "Categories that could not be trained within 24 hours; the job's log says why.",
                    Query(counted(m.TRAINING_JOBS, matchers='outcome="failed"', window="1d"), "failed"),
                    runbook="FlawstreamTrainingFails",
                    limit=1,
                    width=6,
                ),
                number(
                    "Images",
                    IMAGES_PER_S,
                    "Images gone through, all stages together. 0 with jobs under way: they hang or wait for a node.",
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
                    "Jobs that ended",
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
                    "Epoch under way of each category; 0 once it has ended. A line that stays level hangs or waits.",
                    Query(f"max by (category) ({select(m.TRAINING_EPOCH, _CHOSEN)})", "{{category}}"),
                    width=12,
                ),
                lines(
                    "Loss",
                    "none",
                    "Mean of the epoch so far, nats per value; it falls and may go below 0. One that rises: too few or "
                    "mixed images (`flawstream datasets check`), or a learning rate that is too high.",
                    Query(f"max by (category) ({select(m.TRAINING_LOSS, _CHOSEN)})", "{{category}}"),
                    least=None,
                    width=12,
                ),
            ],
        ),
    ],
)
