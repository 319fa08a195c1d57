"""A run as training leaves it, but of numbers and pictures that are known."""

import json

import numpy as np

from sparse_fcmae.evaluation.reconstruction import COLUMNS
from sparse_fcmae.evaluation.sheet import save_picture, sheet

NAME = "<script>alert(1)</script> & \"quotes\" 'n' so"  # of a class and an image
CHECKPOINTS = (4, 8, 12)


def tile(checkpoint, column, row):
    """The one colour of a tile."""
    return (10 * checkpoint, 60 * column, 100 * row)


def made_run(folder, steps=12, **options):
    """A pretraining run of so many steps, 4 to an epoch."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "reconstructions").mkdir()
    (folder / "exported").mkdir()
    config = {"format": "sparse-fcmae pretraining run", "epochs": steps // 4, "batch_size": 8, "image_size": "32x64"}
    config |= {"lr": 1e-3, "val": None, "model": "atto", **options}
    config["images"] = {"dtype": "uint16", "mean": [1.5, 2.5], "std": [0.5, 0.25], "channels": [1, 4]}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": n, "epoch": n / 4, "loss": 1 / n, "lr": 1e-3 / n, "grad_norm": n, "images_per_second": 100.0}
        | {"data_wait": 0.25, "memory_gb": 1.5, "unreadable": 1, "nonfinite": 0}
        for n in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [
        {"step": n, "epoch": n / 4, "knn_top1": n / 100, "val_loss": 2 / (n + 1), "ema_knn_top1": n / 200}
        | {"effective_rank": 40.0 + n, "channel_distance": 0.25, "distance_1.1": 0.25, "distance_3.2": 0.5}
        for n in (0, *CHECKPOINTS)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    (folder / "train.log").write_text(
        "2026-01-01 10:00:00 begun\n"
        f"2026-01-01 10:00:01 unreadable, replaced by another image: {NAME}: cut off\n"
        f"2026-01-01 10:00:02 unreadable, left out of the evaluation: {NAME}: cut off\n"
    )
    for step in CHECKPOINTS:
        tiles = {
            name: np.stack([np.full((32, 64, 3), tile(step, column, row), np.uint8) for row in range(2)])
            for column, name in enumerate(COLUMNS)
        }
        save_picture(sheet(tiles), folder / "reconstructions" / f"step-{step:08d}.png")
    (folder / "exported" / "model.safetensors").write_bytes(bytes(2_500_000))
    (folder / "exported" / "config.json").write_text("{}")
    (folder / "exported" / "README.md").write_text('# x\n\n```python\nload_encoder("FOLDER")\n```\n')
    return folder
