"""Fine-tuning: images and labels -> cross-entropy -> a dense classifier, on the kernels of pretraining."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends import choose_dtype, resolve_backend
from sparse_fcmae.data.augmentation import RandAugment
from sparse_fcmae.data.batches import Batch, TrainingImages
from sparse_fcmae.data.config import MASK_OPTIONS, ReadingConfig
from sparse_fcmae.data.mixing import Mixing
from sparse_fcmae.data.sources.class_folder import open_splits
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.masked import IMAGE_FOLDERS, MASK_FOLDERS
from sparse_fcmae.data.sources.pages import labelled_by_page
from sparse_fcmae.data.sources.parts import labelled_parts
from sparse_fcmae.data.sources.windows import Windows
from sparse_fcmae.data.splits import few_labels
from sparse_fcmae.data.survey import check_fits
from sparse_fcmae.data.views import NativeView, RandomView
from sparse_fcmae.evaluation.accuracy import TOP, accuracy, measure, measures_of
from sparse_fcmae.evaluation.evaluate import EVALUATION
from sparse_fcmae.evaluation.evaluate import save as save_evaluation
from sparse_fcmae.evaluation.mistakes import Answers, draw_mistakes
from sparse_fcmae.evaluation.problems import BETWEEN, PROBLEMS, measure_outputs
from sparse_fcmae.evaluation.run import EvaluationSet, run_model
from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.model.flops import count
from sparse_fcmae.runtime.checkpoint_folder import newest_checkpoint
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.files import read_json
from sparse_fcmae.runtime.options import check_unused, given_flags, image_size_of
from sparse_fcmae.runtime.streams import Stream, torch_seed
from sparse_fcmae.tasks.build import build_classifier, evaluation_view, moving_average, origin_of, training_view
from sparse_fcmae.tasks.config import FinetuneConfig
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.optim import adamw, layer_scale
from sparse_fcmae.training.parallel import device_of_new_model, place, whole_state
from sparse_fcmae.training.plots import draw_evaluations, draw_loss
from sparse_fcmae.training.task import Task
from sparse_fcmae.weights.adapter import PROBLEM_TYPES
from sparse_fcmae.weights.convert import export_model
from sparse_fcmae.weights.examples import classifier_example, evaluate_and_predict

BETAS = (0.9, 0.999)
NAMED = 20  # classes that the log names
DRAWN = {  # by task, the value whose curve is drawn, and what it is called
    "classification": ("top1", "top-1"),
    "multilabel": ("mean_average_precision", "mAP"),
    "regression": ("r2", "R2"),
}


class ClassificationObjective(nn.Module):
    """The loss of a micro-batch whose images are augmented and mixed on the model's device.

    loss: of logits [b, K] and what `mix` makes of labels.
    """

    def __init__(self, model: nn.Module, mix: Mixing, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.mix, self.loss = model, mix, loss

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """pixels: [b, H, W, C]. labels: int64 [b] of classes, or targets float32 [b, K]."""
        with torch.autocast(pixels.device.type, enabled=False):
            images, targets = self.mix(pixels, labels)
        return self.loss(self.model(images).float(), targets)


@dataclass(frozen=True)
class CrossEntropy:
    """The mean cross-entropy of logits [b, K] and classes, int64 [b] or as fractions [b, K].

    label_smoothing: the fraction of a target that is spread over all classes. weights: of the classes, float [K], None
    where all count the same. They weigh whole images, by the classes that these have before smoothing: otherwise the
    share that smoothing gives to rare classes would outweigh the true class of frequent ones.
    """

    label_smoothing: float = 0.0
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        losses = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction="none")
        weights = self.weights.to(logits.device)
        return (losses * (targets @ weights if targets.is_floating_point() else weights[targets])).mean()


class Classification(Task):
    """A classifier that learns the classes of labelled images, and is evaluated on others.

    Where images have several labels or a number each, what is learnt is what a `Problem` makes of their labels.
    """

    outputs = ("loss.png", "accuracy.png", "exported-ema")
    evaluates = True

    def __init__(self, config: FinetuneConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.problem = PROBLEMS.get(config.task)
        check_task(config)
        opening = (config.data, config.val_split, config.seed, config.out, config, self.problem is None)
        self.source, held_out = ranks.main_first(lambda: open_splits(*opening))
        if config.labels_per_class:
            self.source = few_labels(self.source, config.labels_per_class, config.seed)
        checkpoint = ranks.by_main(lambda: newest_checkpoint(Path(config.out))) if config.resume else None
        device = device_of_new_model(config, ranks)
        self.classes = self.problem.outputs_of(self.source.classes) if self.problem else self.source.classes
        self.model, self.form, config, self.notes = build_classifier(
            config, self.source, self.classes, checkpoint, device
        )
        dtype = choose_dtype(config.dtype, ranks.device, config.backend)
        self.config = config = replace(config, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
        self.ema = moving_average(self.model, config.ema_decay) if config.ema_decay else None
        for model in (self.model, self.ema.module) if self.ema else (self.model,):
            place(model.train(), config, ranks)

        classes = len(self.classes)
        mixed = {"random_erasing": config.random_erasing, "mixup": config.mixup, "cutmix": config.cutmix}
        mix = Mixing(classes, self.form, **mixed)
        self.size, self.min_lr = image_size_of(config.image_size), config.min_lr
        augment = RandAugment(config.rand_augment) if config.rand_augment else None
        if augment and not self.form.is_photograph:
            augment = None
            self.notes.append("RandAugment is left out, as it is made for photographs of 8 bits")
        self.training_view = training_view(config, self.size, self.form, augment)
        images = (self.source, held_out)
        self.source, held_out = ranks.main_first(lambda: samples_of(*images, self.training_view, config.max_bad_images))
        self.notes += [*self.source.notes, *(note for note in held_out.notes if note not in self.source.notes)]
        self.notes += said_of(config.task, self.classes)
        weights = balanced_weights(self.source.counts()) if config.class_weights else None
        if weights is not None:
            self.notes.append(f"classes weigh between {weights.min():.3g} and {weights.max():.3g}")
        loss = self.problem.loss if self.problem else CrossEntropy(config.label_smoothing, weights)
        self.objective = ClassificationObjective(self.model, mix, loss)
        own = held_out.take(range(ranks.rank, len(held_out), ranks.world))
        self.judge = held_out.fingerprint
        self.all_held_out = held_out
        self.held_out = EvaluationSet(own, evaluation_view(config, self.size, self.form, ranks.device), ranks)
        self.targets, self.scale = self.source.labels, torch.tensor([0.0, 1.0])
        if self.problem:
            self.targets, self.held_out_targets = (
                self.problem.targets(part, self.classes) for part in (self.source, own)
            )
        if config.task == "regression":  # of targets of mean 0 and deviation 1 a new model's rate is the usual one
            self.scale = torch.stack([self.targets.mean(), self.targets.std().nan_to_num(0) or torch.tensor(1.0)])
            self.targets = (self.targets - self.scale[0]) / self.scale[1]
        names = self.problem.measures if self.problem else measures_of(classes)
        self.measures = (*names, *(f"ema_{name}" for name in names if self.ema))
        parts = count(
            self.model.name,
            image_size=self.size,
            in_chans=self.model.in_chans,
            stem_stride=self.model.stem_stride,
            num_classes=classes,
        )
        self.flops = (2 if config.freeze_encoder else 6) * parts["classifier"].dense
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        self.description = (
            f"{self.model.name} on {ranks.device}, backend {resolve_backend(config.backend, ranks.device.type).name}, "
            f"{config.dtype}, {trained:.1f} M parameters to train; {shown(config.task, classes)}, "
            f"{len(held_out)} images held out"
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
        return batch.pixels, self.targets[batch.index]

    def beside_config(self) -> dict[str, Any]:
        problem = {"problem_type": PROBLEM_TYPES[self.config.task]}
        return {"classes": self.classes, "images": self.form.as_json(), **problem}

    def evaluate(self, log: RunLog, step: int) -> dict[str, float]:
        models = {"": self.model, "ema_": self.ema.module} if self.ema else {"": self.model}
        if self.problem:
            targets = self.held_out_targets
            values, unreadable = measure_outputs(models, self.held_out, targets, self.problem, self.ranks, self.scale)
        else:
            values, unreadable = measure(models, self.held_out, self.ranks)
        log.say_left_out(unreadable)
        return values

    def export(self, run: Path, log: RunLog) -> None:
        exported, ema = run / "exported", None
        answers = None if self.problem else self._answers()
        state = whole_state(self.model, self.ranks)
        if self.ema:
            ema = whole_state(self.ema.module, self.ranks)
        if not self.ranks.main:
            return
        origin = origin_of(
            self.config,
            "fine-tuned as a classifier",
            f"{len(self.source)} images or windows with {shown(self.config.task, len(self.classes))}",
            ("epochs", "batch_size", "lr", "layer_decay", "drop_path", "seed"),
        )
        for name, tensors in (("exported", state), ("exported-ema", ema)):
            if tensors:
                in_units = self._in_units(tensors)
                export_model(self.model, run / name, self.classes, self.form, in_units, origin, self.config.task)
        if ema:
            log.say(f"moving average of the weights in {exported}-ema")
        log.draw(lambda: draw_loss(run, "loss", "loss"))
        value, label = DRAWN[self.config.task]
        log.draw(lambda: draw_evaluations(run / "evaluations.jsonl", value, label, run / "accuracy.png"))
        if self.problem:
            log.say(
                f"model in {exported}; use it with\n\n{evaluate_and_predict(self.config, exported, 'predictions.csv')}"
            )
            return
        config = self.config
        reading = given_flags(config, ReadingConfig)
        log.say(self._save(answers, exported, run / "evaluation"))
        example = classifier_example(self.model, exported, config.data, config.val_split, config.seed, reading)
        log.say(f"classifier in {exported}; use it with\n\n{example}")

    def _answers(self) -> Answers:
        """What the model says of all held-out images, for the main rank. All ranks call it together."""
        self.model.eval()
        logits, index, _ = run_model(self.held_out, self.model)
        self.model.train()
        own = Answers.of(logits, index, TOP) if len(index) else None
        ranks = enumerate(self.ranks.gather(own))
        found = [part._replace(index=part.index * self.ranks.world + rank) for rank, part in ranks if part]
        return Answers(*map(torch.cat, zip(*found, strict=True)))

    def _save(self, answers: Answers, exported: Path, out: Path) -> str:
        """Writes what `evaluate` would write of these answers, unless there is an evaluation on other images.

        Returns what there is to say of it.
        """
        before = read_json(out / EVALUATION) if (out / EVALUATION).is_file() else {}
        if before.get("data", str(self.all_held_out)) != str(self.all_held_out):
            return f"{out} has an evaluation on {before['data']}, and stays as it is"
        labels, view = self.all_held_out.labels[answers.index], self.held_out.view
        found = {
            "weights": str(exported),
            "data": str(self.all_held_out),
            **accuracy(answers.ranked, labels, self.classes),
        }
        save_evaluation(found, draw_mistakes(answers, labels, self.classes, self.all_held_out, view), out)
        return f"what it says of held-out images in {out}"

    def _in_units(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights whose outputs are in the units of the labels, of those that are trained."""
        mean, deviation = self.scale
        head = {"head.weight": state["head.weight"].cpu() * deviation}
        return state | head | {"head.bias": state["head.bias"].cpu() * deviation + mean}


def check_task(config: FinetuneConfig) -> None:
    """Raises UserError for options that mean nothing in a run's task."""
    check_unused(config, (*MASK_OPTIONS, "head_channels"), "is of `task=segmentation`: leave it out, or give that")
    if config.task == "classification":
        return
    without = ["labels_per_class", "class_weights", "label_smoothing"]
    without += ["mixup", "cutmix"] if config.task == "regression" else []
    given = [name for name in without if getattr(config, name)]  # 0 is as good as none
    check_unused(config, given, f"does not go with `task={config.task}`: leave it out")


def said_of(task: str, classes: tuple[str, ...]) -> list[str]:
    """What the log says of the names of outputs, and what they look like instead, a line each."""
    if task == "regression":
        return []
    more = f", and {len(classes) - NAMED} more" if len(classes) > NAMED else ""
    lines = [f"{'classes' if task == 'classification' else 'labels'}: {', '.join(classes[:NAMED])}{more}"]
    if set(classes) <= {*IMAGE_FOLDERS, *MASK_FOLDERS}:
        lines.append("these look like folders of images and of their masks: for segmentation give --task segmentation")
    if task == "classification" and any(BETWEEN in name for name in classes):
        lines.append("some have semicolons: where these are several labels, give --task multilabel")
    return lines


def shown(task: str, outputs: int) -> str:
    """Words for what a model is trained to say."""
    return {"classification": f"{outputs} classes", "multilabel": f"{outputs} labels"}.get(task, "a number each")


def balanced_weights(counts: list[int]) -> Tensor:
    """A weight for each class by which all have the same share of the loss, float [K]. Their mean over samples is 1."""
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
