"""Pretraining in a loop of your own, on one process or, by Accelerate, on many.

    python examples/training_loop.py --images photos --out encoder.pt
    accelerate launch --num_processes 2 examples/training_loop.py --images photos --out encoder.pt

Afterwards `load_encoder("encoder.pt")`, and `sparse-fcmae convert encoder.pt FOLDER --to timm`. It needs the library
accelerate. Beside this `sparse-fcmae pretrain` has recipes, resuming, logs, checks, and data that are no photographs.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sparse_fcmae import create_fcmae

STATISTICS = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], dtype=torch.float64)  # of ImageNet


class Photographs(Dataset):
    """Random square crops of a folder's images, resized and flipped: uint8 [3, size, size]."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        side = int(min(image.size) * float(torch.empty(()).uniform_(0.45, 1.0)))
        left, top = (int(torch.randint(whole - side + 1, ())) for whole in image.size)
        crop = image.resize((self.size, self.size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return pixels.flip(2) if torch.rand(()) < 0.5 else pixels


def part_of_rate(step: int, steps: int) -> float:
    """The learning rate by its peak: warm-up over a twentieth of the steps, then half a cosine."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, Photographs]:
    """The options and the images that they name. Too few images end in one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="atto")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--stem-stride", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    images = Photographs(options.images, options.size)
    if len(images) < options.batch_size:
        parser.error(f"{len(images)} images do not fill a batch: lower --batch-size")
    return options, images


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, writes the weights and returns the losses of the main process."""
    options, images = parsed(arguments)
    accelerator = Accelerator()
    model = create_fcmae(options.model, image_size=options.size, stem_stride=options.stem_stride)
    batches = DataLoader(images, options.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.95), weight_decay=0.05)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    steps, statistics, losses = options.epochs * len(batches), STATISTICS.to(accelerator.device), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: part_of_rate(step, steps))
    with tqdm(total=steps, disable=not accelerator.is_main_process) as bar:
        for _ in range(options.epochs):
            for pixels in batches:
                loss = model(pixels, statistics=statistics).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix_str(f"loss {losses[-1]:.4f}")
                bar.update()
    accelerator.wait_for_everyone()
    accelerator.save({"model": accelerator.unwrap_model(model).state_dict()}, options.out)
    return losses


if __name__ == "__main__":
    main()
