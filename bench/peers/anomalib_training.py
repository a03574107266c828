"""In an environment with anomalib: the time of the epochs of its `Engine.fit` with Fastflow. Run by `bench.training`.

    python anomalib_training.py JOB.json RESULT.json

The job is `{"folder", "epochs", "batch", "threads", "workers"}`; the folder holds the images in `good`. The model is
ResNet18 with 3x3 subnets only, weights random, data through anomalib's own `Folder`; nothing is validated, drawn or
logged. An epoch is from its start to its end as Lightning reports them. Knows nothing of flawstream.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Fastflow
from lightning.pytorch.callbacks import Callback


class EpochTimes(Callback):
    """Measures every epoch."""

    def __init__(self) -> None:
        self.epochs_s = []
        self.began_s = 0.0

    def on_train_epoch_start(self, *_: object) -> None:
        """Start the clock."""
        self.began_s = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        """Stop it."""
        self.epochs_s.append(time.perf_counter() - self.began_s)
        print(f"epoch {len(self.epochs_s)}: {self.epochs_s[-1]:.1f} s", file=sys.stderr, flush=True)


def main(job_file: str, result_file: str) -> None:
    """Do the job."""
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    times = EpochTimes()
    data = Folder(
        "images",
        root=job["folder"],
        normal_dir="good",
        normal_split_ratio=0,
        train_batch_size=job["batch"],
        num_workers=job["workers"],
        test_split_mode="none",
        val_split_mode="none",
    )
    model = Fastflow("resnet18", pre_trained=False, conv3x3_only=True, evaluator=False, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            callbacks=[times],
            logger=False,
            default_root_dir=folder,
            max_epochs=job["epochs"],
            accelerator="cpu",
            devices=1,
            limit_val_batches=0,
            enable_progress_bar=False,
        )
        engine.fit(model, datamodule=data)
    Path(result_file).write_text(json.dumps({"epochs_s": times.epochs_s[1:], "images": len(data.train_data)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
