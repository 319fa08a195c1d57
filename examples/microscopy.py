"""Fields of cells under a microscope: what an encoder that was pretrained on them is worth where masks are few.

    python examples/microscopy.py --images FIELDS --out runs/microscopy

FIELDS is a folder of grey TIFF files, a field each. Every third is held out, and nothing is trained on it. The encoder
is pretrained on the others without masks. Then UperNet is trained on the masks of 1 and of 4 of these, from the
pretrained encoder and from random weights, from three seeds, which choose the fields. Nobody has drawn the masks: they
come from thresholds that are relative to each pixel's surroundings. The neighbours of each window say whether features
know the field that it is from. It needs the extras microscopy and segmentation, and scipy.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter

from sparse_fcmae import embed, finetune, pretrain

SIZE, STEPS, BATCH = 128, 150, 16  # pixels of a window; of fine-tuning
CLASSES = "rest,cell,spot"


def mask_by_thresholds(field: np.ndarray) -> np.ndarray:
    """Cells are brighter than the 101 pixels around, spots are brighter than the cell around: uint8 [H, W]."""
    fine, coarse = gaussian_filter(field.astype(np.float32), 1.5), gaussian_filter(field.astype(np.float32), 6)
    cell = coarse > 1.1 * uniform_filter(coarse, 101)
    spot = fine > 1.3 * coarse + 2
    return np.where(spot, 2, cell).astype(np.uint8)


def lay_out(fields: list[Path], held_out: list[Path], folder: Path) -> Path:
    """A folder of images and masks to train and to measure on, as `finetune --task segmentation` takes it."""
    for split, files in (("train", fields), ("val", held_out)):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, folder / split / "images" / file.name)
            mask = mask_by_thresholds(tifffile.imread(file))
            Image.fromarray(mask).save(folder / split / "masks" / f"{file.stem}.png")
        if {path.name for path in (folder / split / "images").iterdir()} != {file.name for file in files}:
            raise SystemExit(f"{folder} holds other fields than these: choose another --out")
    return folder


def own_neighbours(features: Path) -> tuple[float, float]:
    """How often a window's nearest neighbour is from its own field, of those that do not overlap it; and by chance."""
    found = np.load(features)
    x, files, boxes = found["features"], found["files"], found["boxes"]
    x = x - x.mean(0)
    similarity = (x := x / np.linalg.norm(x, axis=1, keepdims=True)) @ x.T
    same = files[:, None] == files
    left, top, right, bottom = (boxes[:, i] for i in range(4))
    beside = (left[:, None] < right) & (left < right[:, None]) & (top[:, None] < bottom) & (top < bottom[:, None])
    others = ~(same & beside)
    nearest = np.where(others, similarity, -np.inf).argmax(1)
    return float((files == files[nearest]).mean()), float((same & others).sum() / others.sum())


def main(words: list[str] | None = None) -> list[dict]:
    """Returns a row for each number of masks, start and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of grey TIFF files")
    parser.add_argument("--out", type=Path, default=Path("runs/microscopy"), help="folder for the runs; goes on there")
    parser.add_argument("--epochs", type=int, default=300, help="of pretraining")
    parser.add_argument("--batch-size", type=int, default=64, help="of pretraining")
    parser.add_argument("--masks", default="1,4", help="how many masks to train on")
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args(words)

    files = sorted(path for path in given.images.iterdir() if path.suffix.lower() in (".tif", ".tiff"))
    fields, held_out = [file for i, file in enumerate(files) if i % 3 != 2], files[2::3]
    with_spots = [file for file in fields if 2 in mask_by_thresholds(tifffile.imread(file))]  # have all classes
    counts = [int(count) for count in given.masks.split(",")]
    if not held_out or max(counts) > len(with_spots):
        parser.error(
            f"{len(files)} fields, {len(with_spots)} with spots to train on: too few for --masks {given.masks}"
        )
    shape = {"model": "atto", "image_size": SIZE, "stem_stride": 4}
    seen = {"crop": "native", "rotate": True}
    everything = lay_out(fields, held_out, given.out / "pairs")
    encoder = given.out / "encoder"
    pretrained = {"data": str(everything / "train" / "images"), "batch_size": given.batch_size, "lr": 1e-3}
    pretrain(**pretrained, **shape, **seen, epochs=given.epochs, out=str(encoder), resume="auto")
    untrained = given.out / "untrained"  # a step that is too small to change anything
    pretrain(**pretrained | {"lr": 1e-12}, **shape, **seen, max_steps=1, out=str(untrained), resume="auto")
    for name, run in (("pretrained", encoder), ("untrained", untrained)):
        features = embed(data=str(given.images), init=str(run), out=str(given.out / f"{name}.npz"))
        own, chance = own_neighbours(features)
        print(f"{name}: the nearest window is of the same field in {own:.1%}, by chance in {chance:.1%}")

    rows = []
    for seed in map(int, given.seeds.split(",")):
        order = np.random.default_rng(seed).permutation(len(with_spots))
        for masks in counts:
            chosen = [with_spots[i] for i in order[:masks]]
            pairs = lay_out(chosen, held_out, given.out / f"pairs-{masks}-seed{seed}")
            for start in ("pretrained", "random"):
                begin = {"from_scratch": True, "layer_decay": 1.0} | shape if start == "random" else {}
                out = given.out / f"{start}-{masks}-seed{seed}"
                finetune(
                    **begin or {"init": str(encoder)},
                    **seen,
                    task="segmentation",
                    data=str(pairs),
                    class_names=CLASSES,
                    batch_size=BATCH,
                    max_steps=STEPS,
                    warmup_epochs=0.0,
                    eval_every=STEPS,  # epochs, which are never more than steps: in the end alone
                    lr=1e-3,
                    seed=seed,
                    out=str(out),
                    resume="auto",
                )
                measured = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
                rows.append({"masks": masks, "start": start, "seed": seed, "miou": measured["miou"]})
    print("masks  start       mIoU of each seed")
    for masks, start in dict.fromkeys((row["masks"], row["start"]) for row in rows):
        values = [row["miou"] for row in rows if (row["masks"], row["start"]) == (masks, start)]
        print(f"{masks:5}  {start:10}  " + "  ".join(f"{value:.3f}" for value in values))
    return rows


if __name__ == "__main__":
    main()
