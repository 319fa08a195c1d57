"""Detection: RT-DETR of the library transformers on an encoder that this package has pretrained.

    sparse-fcmae convert runs/first backbone --to huggingface
    python examples/detection.py --encoder runs/first --backbone backbone \\
        --images photos --annotations photos.json --out detector

photos.json is in COCO's format: images, categories, and annotations with a bbox each. The model that is written is
transformers' own: RTDetrForObjectDetection.from_pretrained("detector"). It needs transformers, scipy and torchvision.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import ConvNextV2Backbone, ConvNextV2Config, RTDetrConfig, RTDetrForObjectDetection

from sparse_fcmae import load_encoder

STAGES = ["stage2", "stage3", "stage4"]  # their maps have strides of 8, 16 and 32 pixels


class Coco(Dataset):
    """Images resized to a square, and their boxes: centre, width and height as fractions of the image."""

    def __init__(self, images: Path, annotations: Path, size: int, form) -> None:
        found = json.loads(annotations.read_text())
        self.folder, self.size, self.form = images, size, form
        self.names = {category["id"]: category["name"] for category in found["categories"]}
        self.label_of = {number: label for label, number in enumerate(self.names)}
        self.images, self.boxes = found["images"], {image["id"]: [] for image in found["images"]}
        for annotation in found["annotations"]:
            self.boxes[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = Image.open(self.folder / self.images[index]["file_name"]).convert("RGB")
        pixels = torch.from_numpy(np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC)))
        boxes, labels = [], []
        for annotation in self.boxes[self.images[index]["id"]]:
            left, top, width, height = annotation["bbox"]
            boxes.append([left + width / 2, top + height / 2, width, height])
            labels.append(self.label_of[annotation["category_id"]])
        boxes = torch.tensor(boxes).reshape(-1, 4) / torch.tensor([*image.size, *image.size])
        labels = {"boxes": boxes, "class_labels": torch.tensor(labels, dtype=torch.int64)}
        return self.form.normalise(pixels[None])[0], labels


def detector(backbone: str, names: dict[int, str], width: int, queries: int) -> RTDetrForObjectDetection:
    """RT-DETR with new heads on the backbone that `sparse-fcmae convert --to huggingface` has written."""
    inside = ConvNextV2Config.from_pretrained(backbone, out_features=STAGES)
    config = RTDetrConfig(
        backbone_config=inside,
        encoder_in_channels=inside.hidden_sizes[1:],
        d_model=width,
        encoder_hidden_dim=width,
        decoder_in_channels=[width] * 3,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_queries=queries,
        id2label=dict(enumerate(names.values())),
    )
    model = RTDetrForObjectDetection(config)
    pretrained = ConvNextV2Backbone.from_pretrained(backbone, out_features=STAGES)
    model.model.backbone.model.load_state_dict(pretrained.state_dict())
    return model


def train(model: RTDetrForObjectDetection, data: Coco, epochs: int, batch_size: int, lr: float) -> list[float]:
    """The loss of each step. The backbone learns ten times as slowly as what is new."""
    backbone = set(model.model.backbone.parameters())
    new = [parameter for parameter in model.parameters() if parameter not in backbone]
    optimizer = torch.optim.AdamW([{"params": list(backbone), "lr": lr / 10}, {"params": new}], lr, weight_decay=1e-4)
    loader = DataLoader(data, batch_size, shuffle=True, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr / 10, lr], total_steps=steps)
    losses, device = [], next(model.parameters()).device
    model.train()
    with tqdm(total=steps, unit="step") as bar:
        for _ in range(epochs):
            for images, labels in loader:
                labels = [{name: value.to(device) for name, value in of_image.items()} for of_image in labels]
                loss = model(pixel_values=torch.stack(images).to(device), labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
    return losses


@torch.no_grad()
def draw(model: RTDetrForObjectDetection, data: Coco, index: int, least: float, path: Path) -> None:
    """Draws an image with the boxes that the model is surer of than `least`."""
    image = Image.open(data.folder / data.images[index]["file_name"]).convert("RGB")
    found = model.eval()(pixel_values=data[index][0][None].to(model.device))
    probabilities, labels = found.logits[0].sigmoid().max(-1)
    pen, (width, height) = ImageDraw.Draw(image), image.size
    for p, label, (x, y, w, h) in zip(
        probabilities.tolist(), labels.tolist(), found.pred_boxes[0].tolist(), strict=True
    ):
        if p >= least:
            corner = ((x - w / 2) * width, (y - h / 2) * height)
            pen.rectangle((*corner, (x + w / 2) * width, (y + h / 2) * height), outline="red", width=2)
            pen.text(corner, f"{model.config.id2label[label]} {p:.2f}", fill="red")
    image.save(path)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, help="the run, which knows how its images are normalised")
    parser.add_argument("--backbone", required=True, help="the same, converted for Hugging Face")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=300)
    given = parser.parse_args(arguments)
    data = Coco(given.images, given.annotations, given.size, load_encoder(given.encoder).transform.form)
    model = detector(given.backbone, data.names, given.width, given.queries)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    losses = train(model, data, given.epochs, given.batch_size, given.lr)
    model.save_pretrained(given.out)
    draw(model, data, 0, 0.5, given.out / "first.png")
    return losses


if __name__ == "__main__":
    main()
