"""Fine-tuning: images and labels -> cross-entropy -> a dense classifier, on the kernels of pretraining."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends import choose_dtype, resolve_backend
from sparse_fcmae.data.augmentation import RandAugment
from sparse_fcmae.data.batches import Batch, TrainingImages
from sparse_fcmae.data.config import ReadingConfig
from sparse_fcmae.data.mixing import Mixing
from sparse_fcmae.data.sources.class_folder import open_splits
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.pages import labelled_by_page
from sparse_fcmae.data.sources.parts import labelled_parts
from sparse_fcmae.data.sources.windows import Windows
from sparse_fcmae.data.splits import few_labels
from sparse_fcmae.data.survey import check_fits
from sparse_fcmae.data.views import NativeView, RandomView
from sparse_fcmae.evaluation.accuracy import measure, measures_of
from sparse_fcmae.evaluation.run import EvaluationSet
from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.model.flops import count
from sparse_fcmae.runtime.checkpoint_folder import newest_checkpoint
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import given_flags, image_size_of
from sparse_fcmae.runtime.streams import Stream, torch_seed
from sparse_fcmae.tasks.build import build_classifier, evaluation_view, moving_average, origin_of, training_view
from sparse_fcmae.tasks.config import FinetuneConfig
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.optim import adamw, layer_scale
from sparse_fcmae.training.parallel import device_of_new_model, place, whole_state
from sparse_fcmae.training.plots import draw_evaluations, draw_loss
from sparse_fcmae.training.task import Task
from sparse_fcmae.weights.convert import export_model
from sparse_fcmae.weights.examples import classifier_example

BETAS = (0.9, 0.999)


class ClassificationObjective(nn.Module):
    """The cross-entropy of a micro-batch whose images are augmented and mixed on the model's device.

    weights: of the classes, float [K], None where all count the same.
    """

    def __init__(self, model: nn.Module, mix: Mixing, label_smoothing: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.mix, self.label_smoothing, self.weights = model, mix, label_smoothing, weights

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """pixels: [b, H, W, C]. labels: int64 [b]."""
        with torch.autocast(pixels.device.type, enabled=False):
            images, targets = self.mix(pixels, labels)
        logits = self.model(images).float()
        if self.weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        weights = self.weights.to(logits.device)
        losses = F.cross_entropy(logits, targets, weights, label_smoothing=self.label_smoothing, reduction="none")
        return losses.mean()  # and not by the sum of the weights that happen to be in a micro-batch


class Classification(Task):
    """A classifier that learns the classes of labelled images, and is evaluated on others."""

    outputs = ("loss.png", "accuracy.png", "exported-ema")

    def __init__(self, config: FinetuneConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        for name in ("masks", "mask_column", "mask_name", "class_names", "head_channels"):
            if getattr(config, name) is not None:
                raise UserError(f"`{name}` is of `task=segmentation`: leave it out, or give that")
        opening = (config.data, config.val_split, config.seed, config.out, config)
        self.source, held_out = ranks.main_first(lambda: open_splits(*opening))
        if config.labels_per_class:
            self.source = few_labels(self.source, config.labels_per_class, config.seed)
        checkpoint = ranks.by_main(lambda: newest_checkpoint(Path(config.out))) if config.resume else None
        device = device_of_new_model(config, ranks)
        self.model, self.form, config, self.notes = build_classifier(config, self.source, checkpoint, device)
        dtype = choose_dtype(config.dtype, ranks.device, config.backend)
        self.config = config = replace(config, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
        self.ema = moving_average(self.model, config.ema_decay) if config.ema_decay else None
        for model in (self.model, self.ema.module) if self.ema else (self.model,):
            place(model.train(), config, ranks)

        classes = len(self.source.classes)
        mixed = {"random_erasing": config.random_erasing, "mixup": config.mixup, "cutmix": config.cutmix}
        mix = Mixing(classes, self.form, **mixed)
        weights = balanced_weights(self.source.counts()) if config.class_weights else None
        self.objective = ClassificationObjective(self.model, mix, config.label_smoothing, weights)
        self.size, self.min_lr = image_size_of(config.image_size), config.min_lr
        augment = RandAugment(config.rand_augment) if config.rand_augment else None
        if augment and not self.form.is_photograph:
            augment = None
            self.notes.append("RandAugment is left out, as it is made for photographs of 8 bits")
        self.training_view = training_view(config, self.size, self.form, augment)
        images = (self.source, held_out)
        self.source, held_out = ranks.main_first(lambda: samples_of(*images, self.training_view, config.max_bad_images))
        self.notes += [*self.source.notes, *(note for note in held_out.notes if note not in self.source.notes)]
        own = held_out.take(range(ranks.rank, len(held_out), ranks.world))
        self.judge = held_out.fingerprint
        self.held_out = EvaluationSet(own, evaluation_view(config, self.size, self.form, ranks.device), ranks)
        names = measures_of(classes)
        self.measures = (*names, *(f"ema_{name}" for name in names if self.ema))
        parts = count(
            self.model.name,
            image_size=self.size,
            in_chans=self.model.in_chans,
            stem_stride=self.model.stem_stride,
            num_classes=len(self.source.classes),
        )
        self.flops = (2 if config.freeze_encoder else 6) * parts["classifier"].dense
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        self.description = (
            f"{self.model.name} on {ranks.device}, backend {resolve_backend(config.backend, ranks.device.type).name}, "
            f"{config.dtype}, {trained:.1f} M parameters to train; {classes} classes, {len(held_out)} images held out"
        )

    def dataset(self) -> TrainingImages:
        return TrainingImages(self.source, self.training_view, self.config.seed)

    def optimizer(self) -> torch.optim.Optimizer:
        grouped = self.config.layer_decay_type == "group"
        scale = layer_scale(self.config.layer_decay, size_of(self.model.name)[0], grouped)
        return adamw(self.model, self.config.weight_decay, BETAS, undecayed=(".gamma", ".beta"), scale=scale)

    def inputs(self, batch: Batch, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Pixels and labels. What is drawn for a micro-batch follows from its place in the global batch."""
        place = self.ranks.rank * (self.config.batch_size // self.ranks.world) + first
        torch.manual_seed(torch_seed(self.config.seed, Stream.AUGMENTATION, step, place))
        return batch.pixels, self.source.labels[batch.index]

    def beside_config(self) -> dict[str, Any]:
        return {"classes": self.source.classes, "images": self.form.as_json()}

    def evaluate(self, log: RunLog) -> dict[str, float]:
        models = {"": self.model, "ema_": self.ema.module} if self.ema else {"": self.model}
        values, unreadable = measure(models, self.held_out, self.ranks)
        log.say_left_out(unreadable)
        return values

    def export(self, run: Path, log: RunLog) -> None:
        exported, ema = run / "exported", None
        state = whole_state(self.model, self.ranks)
        if self.ema:
            ema = whole_state(self.ema.module, self.ranks)
        if not self.ranks.main:
            return
        origin = origin_of(
            self.config,
            "fine-tuned as a classifier",
            f"{len(self.source)} images or windows of {len(self.source.classes)} classes",
            ("epochs", "batch_size", "lr", "layer_decay", "drop_path", "seed"),
        )
        export_model(self.model, exported, self.source.classes, self.form, state, origin)
        if ema:
            export_model(self.model, run / "exported-ema", self.source.classes, self.form, ema, origin)
            log.say(f"moving average of the weights in {exported}-ema")
        log.draw(lambda: draw_loss(run, "loss", "loss"))
        log.draw(lambda: draw_evaluations(run / "evaluations.jsonl", "top1", "top-1", run / "accuracy.png"))
        config = self.config
        reading = given_flags(config, ReadingConfig)
        example = classifier_example(self.model, exported, config.data, config.val_split, config.seed, reading)
        log.say(f"classifier in {exported}; use it with\n\n{example}")


def balanced_weights(counts: list[int]) -> Tensor:
    """A weight for each class by which all have the same share of the loss, float [K]. Their mean over images is 1."""
    images = torch.tensor(counts, dtype=torch.float64)
    return (images.sum() / (len(counts) * images)).float()


def samples_of(
    trained: Labelled, held_out: Labelled, view: RandomView | NativeView, max_bad_images: float
) -> tuple[Labelled, Labelled]:
    """Training and held-out images by pages where these are images, and the former as windows where the view is native.

    Raises UserError where a few of the training images, evenly spread, are not what the view takes.
    """
    trained, held_out = (labelled_by_page(part, view.reading, max_bad_images) for part in (trained, held_out))
    check_fits(trained, lambda file: view(file, np.random.default_rng(0)))
    if isinstance(view, NativeView):
        trained = labelled_parts(trained, Windows(trained.source, view, max_bad_images))
    return trained, held_out
