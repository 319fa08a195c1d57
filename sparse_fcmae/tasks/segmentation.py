"""Segmentation: images and masks -> cross-entropy of pixels -> UperNet on the encoder, with pretraining's kernels."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends import choose_dtype, resolve_backend
from sparse_fcmae.data.batches import Batch, TrainingImages
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.masks import IGNORED, MaskClasses, classes_of, nearest, read_mask
from sparse_fcmae.data.sources.labelled import Some
from sparse_fcmae.data.sources.masked import MaskedImages, Pair, another_size, open_masked_splits, survey_masks
from sparse_fcmae.data.sources.windows import Windows
from sparse_fcmae.data.survey import check_fits
from sparse_fcmae.data.views import NativeView, RandomView
from sparse_fcmae.evaluation.overlays import draw_overlays
from sparse_fcmae.evaluation.run import EvaluationView, together
from sparse_fcmae.evaluation.segmentation import measure_tiles, scores
from sparse_fcmae.evaluation.tiles import Tiles
from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.model.segmenter import Segmenter
from sparse_fcmae.runtime.checkpoint_folder import newest_checkpoint
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import writing
from sparse_fcmae.runtime.options import check_unused, image_size_of, listed
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.runtime.streams import Stream, torch_seed
from sparse_fcmae.tasks.build import build_segmenter, evaluation_view, moving_average, origin_of, training_view
from sparse_fcmae.tasks.config import FinetuneConfig
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.optim import adamw, layer_scale
from sparse_fcmae.training.parallel import place, whole_state
from sparse_fcmae.training.plots import draw_evaluations, draw_loss
from sparse_fcmae.training.task import Task
from sparse_fcmae.weights.examples import evaluate_and_predict
from sparse_fcmae.weights.segmenter import export_segmenter

BETAS = (0.9, 0.999)
AUXILIARY = 0.4  # weight of the auxiliary head's loss, as in mmsegmentation
USUALLY_IGNORED, SHOWN_CLASSES = "255", 20
SHOWN = 4  # held-out images that are drawn at each checkpoint
OF_CLASSES = (
    "labels_per_class",
    "class_weights",
    "label_smoothing",
    "mixup",
    "cutmix",
    "rand_augment",
    "random_erasing",
    "preset",
)


@dataclass(frozen=True)
class PairView:
    """The same part of an image and of its mask: pixels [H, W, C], and labels int16 [H, W]."""

    view: RandomView | NativeView
    classes: MaskClasses

    def __call__(self, pair: Pair, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        image, mask = open_image(pair.image, self.view.reading), read_mask(pair.mask)
        if mask.shape[::-1] != image.size:
            raise OSError(f"its mask {another_size(mask, image.size)}")
        pixels, crop = self.view.with_crop(image, rng)
        return pixels, crop.turned(self.classes.labels(nearest(mask, crop.box, crop.size)))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.view.size

    @property
    def reading(self) -> Any:
        """As what images are read."""
        return self.view.reading

    @property
    def nbytes(self) -> int:
        """Bytes of what a call returns."""
        return self.view.nbytes + 2 * self.size[0] * self.size[1]


class SegmentationObjective(nn.Module):
    """The cross-entropy of a micro-batch's pixels, of UperNet and, with the weight AUXILIARY, of the auxiliary head."""

    def __init__(self, model: Segmenter, form: Any) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """pixels: [b, H, W, C]. labels: int16 [b, H, W], IGNORED where a pixel does not count."""
        with torch.autocast(pixels.device.type, enabled=False):
            images = self.form.normalise(pixels)
        labels = labels.long()
        counted = (labels != IGNORED).sum().clamp_min(1)  # a mean over no pixel would be no number
        losses = [
            F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / counted
            for logits in self.model.both(images)
        ]
        return losses[0] + AUXILIARY * losses[1]


class Segmentation(Task):
    """A model that learns the classes of pixels, and is evaluated on other images."""

    outputs = ("loss.png", "miou.png", "exported-ema", "segmentations")
    evaluates = True
    divides = False  # a part of a single image has no statistics

    def __init__(self, config: FinetuneConfig, ranks: Ranks) -> None:
        self.ranks, self.said = ranks, list[str]()
        check_unused(config, OF_CLASSES, "is of `task=classification`: leave it out")
        check_unused(config, ("parallel", "cpu_offload"), "does not go with `task=segmentation`: leave it out")
        opening = (config.data, config, config.val_split, config.seed)
        images, held_out = ranks.main_first(lambda: open_masked_splits(*opening))
        checkpoint = ranks.by_main(lambda: newest_checkpoint(Path(config.out))) if config.resume else None
        saved = (RunFolder(config.out, config.kind).saved_options() or {}) if config.resume else {}
        if config.class_names and Path(config.class_names).is_file():  # found from any folder when the config is used
            config = replace(config, class_names=str(Path(config.class_names).resolve()))
        self.model, self.form, config, self.notes = build_segmenter(
            config, images.source, lambda reading: self._classes(config, images, held_out, reading, saved), checkpoint
        )
        check_batches(config, ranks)
        dtype = choose_dtype(config.dtype, ranks.device, config.backend)
        self.config = config = replace(config, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
        self.ema = moving_average(self.model, config.ema_decay) if config.ema_decay else None
        for model in (self.model, self.ema.module) if self.ema else (self.model,):
            place(model.train(), config, ranks)
        self.objective = SegmentationObjective(self.model, self.form)
        self.size, self.min_lr = image_size_of(config.image_size), config.min_lr
        self.view = PairView(training_view(config, self.size, self.form), self.classes)
        self.source = ranks.main_first(lambda: samples_of(images, self.view, config.max_bad_images))
        self.notes += [*self.said, *self.source.notes]
        images_at_once = replace(
            config, micro_batch_size=min(config.micro_batch_size, config.batch_size // ranks.world)
        )
        self.evaluation_view: EvaluationView = evaluation_view(images_at_once, self.size, self.form, ranks.device)
        window = self.size if self.evaluation_view.native else None
        own = held_out.take(range(ranks.rank, len(held_out), ranks.world))
        self.judge = held_out.fingerprint
        self.tiles = Tiles(own.source, own.masks, window, self.evaluation_view.reading)
        self.notes += [note for note in self.tiles.notes if note not in self.notes]
        self.shown = held_out.take(range(min(SHOWN, len(held_out))))
        names = ("miou", "pixel_accuracy", "mean_accuracy")
        self.measures = (*names, *(f"ema_{name}" for name in names if self.ema))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        self.description = (
            f"{self.model.backbone.name} with UperNet of {config.head_channels} channels on {ranks.device}, backend "
            f"{resolve_backend(config.backend, ranks.device.type).name}, {config.dtype}, {trained:.1f} M parameters to "
            f"train; {len(self.classes)} classes, seen with {config.image_size} pixels, {len(held_out)} images held out"
        )

    def _classes(
        self, config: FinetuneConfig, images: MaskedImages, held_out: MaskedImages, reading: Any, saved: dict[str, Any]
    ) -> MaskClasses:
        """The classes of all masks, those of the run that is resumed where there is one."""
        if saved.get("mask_values"):
            self.classes = MaskClasses(tuple(saved["mask_values"]), tuple(saved["classes"]), tuple(saved["ignored"]))
            return self.classes
        ignored = () if config.ignore == "none" else tuple(listed("ignore", config.ignore or USUALLY_IGNORED, int))
        names = names_of(config.class_names)

        def survey() -> tuple[Counter[int], Counter[int]]:
            return survey_masks(images, reading), survey_masks(held_out, reading)

        trained, judged = self.ranks.by_main(survey)
        self.classes = classes_of(trained, ignored, names)
        if unknown := sorted(set(judged) - set(trained) - set(ignored)):
            raise UserError(
                f"{config.data}: held-out masks have the value {unknown[0]}, and no mask that is trained on has it: "
                "give it to `ignore`, or move images"
            )
        both = zip(self.classes.names, self.classes.values, strict=True)
        shown = [name if name == str(value) else f"{name} ({value})" for name, value in both]
        more = f", and {len(shown) - SHOWN_CLASSES} more" if len(shown) > SHOWN_CLASSES else ""
        share = sum(trained[value] for value in ignored) / trained.total()
        self.said = [f"classes of pixels: {', '.join(shown[:SHOWN_CLASSES])}{more}"]
        if share:
            values = ", ".join(str(value) for value in ignored if trained[value])
            self.said.append(f"{100 * share:.2g} % of the pixels are ignored, which have the value {values}")
        return self.classes

    def dataset(self) -> TrainingImages:
        return TrainingImages(self.source, self.view, self.config.seed)

    def optimizer(self) -> torch.optim.Optimizer:
        scale = layer_scale(
            self.config.layer_decay, size_of(self.model.backbone.name)[0], self.config.layer_decay_type == "group"
        )
        return adamw(
            self.model,
            self.config.weight_decay,
            BETAS,
            undecayed=(".gamma", ".beta"),
            scale=lambda name: scale(name.removeprefix("backbone.")),
        )

    def inputs(self, batch: Batch, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Pixels and labels. What is drawn for a micro-batch follows from its place in the global batch."""
        place = self.ranks.rank * (self.config.batch_size // self.ranks.world) + first
        torch.manual_seed(torch_seed(self.config.seed, Stream.AUGMENTATION, step, place))
        blank = torch.zeros(len(batch.pixels), *self.size, dtype=torch.int16)
        return batch.pixels, torch.stack(batch.labels) if batch.labels else blank

    def beside_config(self) -> dict[str, Any]:
        classes = self.classes
        named = {"classes": classes.names, "mask_values": classes.values, "ignored": classes.ignored}
        return named | {"images": self.form.as_json()}

    def evaluate(self, log: RunLog, step: int) -> dict[str, float]:
        models = {"": self.model, "ema_": self.ema.module} if self.ema else {"": self.model}
        values, bad, numbers = {}, [], range(len(self.tiles))
        for prefix, model in models.items():
            self._share_statistics(model)
            model.eval()
            counts, unread = measure_tiles(model, self.tiles, numbers, self.evaluation_view, self.classes)
            model.train()
            counts = torch.stack(self.ranks.gather(counts)).sum(0)
            if not counts.any():
                raise UserError(f"no pixel of the held-out images of {self.config.data} can be judged")
            bad += unread
            found = scores(counts, self.classes.names)
            values |= {f"{prefix}{name}": found[name] for name in ("miou", "pixel_accuracy", "mean_accuracy")}
        log.say_left_out(together(self.ranks.gather([*self.tiles.left_out, *bad])))
        return values

    def _share_statistics(self, model: nn.Module) -> None:
        """Gives all ranks the main one's means and variances of batches, which each has of its own images."""
        if self.ranks.world > 1:
            buffers = self.ranks.by_main(lambda: {name: value.cpu() for name, value in model.named_buffers()})
            for name, value in model.named_buffers():
                value.copy_(buffers[name])

    def illustrate(self, run: Path, step: int) -> None:
        """The same held-out images each time: as they are, their masks, and what the model makes of them."""
        if not self.ranks.main:
            return
        self.model.eval()
        tiles = Tiles(self.shown.source, self.shown.masks, self.tiles.window, self.evaluation_view.reading)
        with writing(run):
            (run / "segmentations").mkdir(exist_ok=True)
        view, path = self.evaluation_view, run / "segmentations" / f"step-{step:08d}.png"
        draw_overlays(self.model, tiles, view, self.classes, path)
        self.model.train()

    def export(self, run: Path, log: RunLog) -> None:
        exported, state = run / "exported", whole_state(self.model, self.ranks)
        ema = whole_state(self.ema.module, self.ranks) if self.ema else None
        if not self.ranks.main:
            return
        origin = origin_of(
            self.config,
            "fine-tuned for segmentation",
            f"{len(self.source)} images or windows of {len(self.classes)} classes",
            ("epochs", "batch_size", "lr", "layer_decay", "drop_path", "seed"),
        )
        export_segmenter(self.model, exported, self.classes, self.form, state, origin)
        if ema:
            export_segmenter(self.model, run / "exported-ema", self.classes, self.form, ema, origin)
            log.say(f"moving average of the weights in {exported}-ema")
        log.draw(lambda: draw_loss(run, "loss", "loss"))
        log.draw(lambda: draw_evaluations(run / "evaluations.jsonl", "miou", "mIoU", run / "miou.png"))
        usage = evaluate_and_predict(self.config, exported, "masks --maps overlays")
        log.say(f"segmentation model in {exported}; use it with\n\n{usage}")


def check_batches(config: FinetuneConfig, ranks: Ranks) -> None:
    """Raises UserError where a micro-batch would have a single image, of which batch norms can't make statistics."""
    of_rank = config.batch_size // ranks.world
    if 1 in (min(config.micro_batch_size, of_rank), of_rank % config.micro_batch_size):
        raise UserError(
            f"`batch_size` {config.batch_size} and `micro_batch_size` {config.micro_batch_size} leave a micro-batch of "
            "one image: segmentation needs two at once, so choose others"
        )


def names_of(text: str | None) -> tuple[str, ...] | None:
    """Names of classes: with commas between them, or the lines of a file."""
    if text is None:
        return None
    if "," not in text and Path(text).suffix and not Path(text).is_file():
        raise UserError(f"`class_names` {text}: no such file")
    if Path(text).is_file():
        try:
            return tuple(line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"`class_names` {text} can't be read: {error}") from None
    return tuple(name.strip() for name in text.split(","))


def samples_of(images: MaskedImages, view: PairView, max_bad_images: float) -> MaskedImages:
    """What is trained on: images, or of large ones as many windows as fit into them where the view is native.

    Raises UserError where a few of them, evenly spread, are not what the view takes.
    """
    check_fits(images, lambda file: view(file, np.random.default_rng(0)))
    if isinstance(view.view, NativeView):
        windows = Windows(images.source, view.view, max_bad_images)
        masks = Some(images.masks, [windows.whole(index) for index in range(len(windows))])
        return MaskedImages(windows, masks)
    return images
