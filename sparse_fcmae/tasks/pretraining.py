"""FCMAE pretraining: images -> masks -> loss on the masked patches -> a dense encoder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_fcmae.backends import choose_dtype, resolve_backend
from sparse_fcmae.data.batches import Batch, TrainingImages
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.map_style import MapStyleImages
from sparse_fcmae.data.sources.opening import is_named, open_images
from sparse_fcmae.data.sources.pages import by_page
from sparse_fcmae.data.sources.windows import Windows
from sparse_fcmae.data.survey import asked_reading, check_fits
from sparse_fcmae.data.views import CentreView, NativeView, RandomView
from sparse_fcmae.evaluation.feature_check import FeatureCheck, images_for, steps_between_checks
from sparse_fcmae.evaluation.held_out import HeldOutLoss
from sparse_fcmae.evaluation.probes import KNNMonitor
from sparse_fcmae.evaluation.reconstruction import draw_reconstruction, reconstruct, sample_images
from sparse_fcmae.evaluation.sheet import save_picture
from sparse_fcmae.evaluation.verdict import Verdict, judge
from sparse_fcmae.runtime.checkpoint_folder import newest_checkpoint
from sparse_fcmae.runtime.distributed import Ranks, process_group
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import writing
from sparse_fcmae.runtime.options import image_size_of, keywords_of
from sparse_fcmae.runtime.rows import Rows
from sparse_fcmae.runtime.streams import Stream, torch_seed
from sparse_fcmae.tasks.build import (
    build_fcmae,
    evaluation_view,
    format_of_run,
    moving_average,
    options_of_weights,
    origin_of,
    training_flops,
    training_view,
)
from sparse_fcmae.tasks.config import PretrainConfig
from sparse_fcmae.tasks.hints import hints
from sparse_fcmae.tasks.recipes import pretraining_recipe
from sparse_fcmae.training.configure import configure
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.loop import train
from sparse_fcmae.training.optim import adamw
from sparse_fcmae.training.parallel import device_of_new_model, is_sharded, place, shards, whole_state
from sparse_fcmae.training.plots import draw_loss
from sparse_fcmae.training.schedule import Schedule
from sparse_fcmae.training.step import GraphedTrainStep
from sparse_fcmae.training.task import Task
from sparse_fcmae.weights.convert import export_model
from sparse_fcmae.weights.examples import usage_example

BETAS = (0.9, 0.95)
SAMPLES = 8  # images in a picture of reconstructions
MOST_PICTURES = 100  # of them that a run keeps


@keywords_of(PretrainConfig)
def pretrain(options: dict[str, Any]) -> Path:
    """Pretrains an encoder on unlabelled images and returns the folder that it is exported to.

    `data` may also be a data set of torch's map-style, or a list or array of images (see `MapStyleImages`). With
    `resume=True` only `out` is needed: what is left out is as the run was started with. With `init`, what is left
    out is as these weights are. Raises UserError for what the user can put right, and Interrupted, after saving a
    checkpoint, on Ctrl-C or SIGTERM.
    """
    if options.get("init") and not options.get("resume"):
        of_weights = options_of_weights(options["init"])
        if "model" in options:
            of_weights = {name: value for name, value in of_weights.items() if name not in ("depths", "dims")}
        options = of_weights | options
    source = None
    if options.get("data") is not None and not is_named(options["data"]):
        source = MapStyleImages(options["data"])
        options = options | {"data": str(source)}
    config = configure(PretrainConfig, options)
    with process_group(config.device) as ranks:
        return train(Pretraining(config, ranks, source))


class PretrainingObjective(nn.Module):
    """The loss of a micro-batch. form: of its images. num_visible: patches of each that its mask leaves visible."""

    def __init__(self, model: nn.Module, form: ImageFormat, num_visible: int) -> None:
        super().__init__()
        self.model, self.num_visible = model, num_visible
        self.statistics = form.statistics(next(model.parameters()).device)

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """pixels: [b, H, W, C] of the format's dtype. mask: bool [b, H/P, W/P], True = masked."""
        images, statistics = pixels.permute(0, 3, 1, 2), self.statistics.to(pixels.device)
        return self.model.errors(images, mask, self.num_visible, statistics).mean()


class Pretraining(Task):
    """An FCMAE that learns to fill in the masked patches of a source's images."""

    outputs = ("loss.png", "reconstructions", "exported-ema")

    def __init__(self, config: PretrainConfig, ranks: Ranks, source: ImageSource | None = None) -> None:
        self.ranks, self.size = ranks, image_size_of(config.image_size)
        self.source = ranks.main_first(lambda: images_of(config, source))
        self.form, found = ranks.by_main(lambda: format_of_run(config, self.source))
        crop = config.crop or ("native" if self.form.native else "resized")
        config = replace(config, in_chans=self.form.in_chans, crop=crop)
        self.form = replace(self.form, native=crop == "native")
        self.training_view = training_view(config, self.size, self.form)
        if config.crop == "native":
            fitting = (self.source, self.training_view, config.max_bad_images)
            self.source = ranks.main_first(lambda: Windows(*fitting))
        held_out = ranks.main_first(lambda: held_out_of(config, self.training_view)) if config.val else None
        config, recipe = pretraining_recipe(config, len(self.source), ranks.world)
        dtype = choose_dtype(config.dtype, ranks.device, config.backend)
        self.config = config = replace(config, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
        self.cuda_graphs = accelerated(config, ranks)
        checkpoint = ranks.by_main(lambda: newest_checkpoint(Path(config.out))) if config.resume else None
        self.model, notes = build_fcmae(config, checkpoint is not None, device_of_new_model(config, ranks))
        self.ema = moving_average(self.model, config.ema_decay) if config.ema_decay else None
        for model in (self.model, self.ema.module) if self.ema else (self.model,):
            place(model, config, ranks, methods=("encode", "errors"))
        self.notes = [*recipe, *self.source.notes, *found, *notes]

        self.objective = PretrainingObjective(self.model, self.form, self.model.num_visible(self.size))
        if config.compile:
            self.objective.compile(fullgraph=True, dynamic=False)
        self.step_type = GraphedTrainStep if self.cuda_graphs else Task.step_type
        view = evaluation_view(config, self.size, self.form, ranks.device)
        self.monitor = KNNMonitor(config.knn, view, ranks, config) if config.knn else None
        self.held_out = HeldOutLoss(held_out, view, ranks, config.seed) if held_out else None
        names = ["knn_top1"] * bool(self.monitor) + ["val_loss"] * bool(held_out)
        self.measures = (*names, *(f"ema_{name}" for name in names if self.ema))
        measured = {"knn_top1": self.monitor, "val_loss": held_out}.get((config.monitor or "").removeprefix("ema_"))
        self.judge = measured.fingerprint if measured else ""
        self.features: FeatureCheck | None = None
        self.rows: list[Rows] = []
        self.centre = CentreView(self.size, self.training_view.reading, native=config.crop == "native")
        samples = sample_images(self.source, SAMPLES, self.centre)
        self.samples = samples.to(ranks.device)
        if not (config.resume or config.init):
            self.notes += hints(self.model.encoder, samples)
        self.flops = training_flops(config, self.model)
        backend = resolve_backend(config.backend, ranks.device.type)
        self.description = (
            f"{self.model.encoder.name} on {ranks.device}, backend {backend.name}, {config.dtype}, "
            f"{'from CUDA graphs, ' if self.cuda_graphs else ''}"
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters with the decoder"
        )

    def plan(self, schedule: Schedule) -> None:
        """Decides how often features are checked. A range test is not judged, as it goes on until the loss explodes."""
        self.schedule, self.evaluates = schedule, not schedule.lr_range or bool(self.measures)
        images = images_for(self.source, self.centre)
        sizes = (images, self.config.batch_size, schedule.steps, schedule.eval_steps)
        every = steps_between_checks(*sizes) if not (schedule.lr_range or is_sharded(self.model)) else None
        if not (every or schedule.lr_range):
            why = "the model is in shards" if is_sharded(self.model) else "the run has too few images or steps for that"
            self.notes.append(f"it is not checked whether features collapse, as {why}")
        if every:
            bf16 = self.config.dtype == "bf16"
            self.features = FeatureCheck(self.source, self.centre, self.form, every, bf16)
        self.evaluates_untrained = bool(self.measures or self.features)

    def beside_config(self) -> dict[str, Any]:
        return {"images": self.form.as_json()}

    def dataset(self) -> TrainingImages:
        return TrainingImages(self.source, self.training_view, self.config.seed)

    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.model, self.config.weight_decay, BETAS, capturable=self.cuda_graphs)

    def inputs(self, batch: Batch, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Pixels and masks. The masks of the whole global batch are drawn together, whatever the number of ranks."""
        if first == 0:
            device, seed = self.ranks.device, torch_seed(self.config.seed, Stream.MASKS, step)
            generator = torch.Generator(device).manual_seed(seed)
            masks = self.model.draw_mask(self.config.batch_size, self.size, generator=generator)
            self.masks = masks.chunk(self.ranks.world)[self.ranks.rank]
        return batch.pixels, self.masks[first : first + len(batch.pixels)]

    def evaluate(self, log: RunLog, step: int) -> dict[str, float]:
        values, models = {}, {"": self.model, "ema_": self.ema.module} if self.ema else {"": self.model}
        for prefix, model in models.items():
            for name, measure in self._measuring(model).items():
                values[f"{prefix}{name}"], unreadable = measure()
                log.say_left_out(unreadable)
        if self.features and (step % self.features.every == 0 or step == self.schedule.steps):
            values |= self.features.of(self.model.encoder)
        return values

    def verdict(self, run: Path) -> Verdict | None:
        if self.schedule.lr_range:
            return None
        self.rows = self.rows or [Rows(run / name) for name in ("metrics.jsonl", "evaluations.jsonl")]
        for rows in self.rows:
            rows.read_on()
        plan, config = self.schedule, self.config
        return judge(*self.rows, plan.warmup_steps, plan.steps, config.norm_pix_loss, bool(config.init))

    def _measuring(self, model: nn.Module) -> dict[str, Callable[[], tuple[float, list[BadImage]]]]:
        """What is measured of a model, by name: functions that give the value and the unreadable images."""
        measuring = {"knn_top1": lambda: self.monitor.top1(model.encode), "val_loss": lambda: self.held_out.of(model)}
        return {name: measure for name, measure in measuring.items() if name in self.measures}

    def illustrate(self, run: Path, step: int) -> None:
        """The same images and masks each time, so that the pictures of different steps can be compared."""
        if not len(self.samples):
            return
        generator = torch.Generator().manual_seed(self.config.seed)
        mask = self.model.draw_mask(len(self.samples), self.size, generator=generator)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16"):
            found = reconstruct(self.model, self.form, self.samples, mask)
        if self.ranks.main:
            with writing(run):
                (run / "reconstructions").mkdir(exist_ok=True)
            save_picture(draw_reconstruction(found, self.form), run / "reconstructions" / f"step-{step:08d}.png")
            thin_out(run / "reconstructions", MOST_PICTURES)

    def export(self, run: Path, log: RunLog) -> None:
        exported, state = run / "exported", whole_state(self.model.encoder, self.ranks)
        ema = whole_state(self.ema.module.encoder, self.ranks) if self.ema else None
        if not self.ranks.main:
            return
        origin = origin_of(
            self.config,
            "pretrained by fully convolutional masked autoencoding",
            f"{len(self.source)} images or windows",
            ("epochs", "batch_size", "lr", "mask_ratio", "min_crop", "seed"),
        )
        export_model(self.model.encoder, exported, form=self.form, state=state, origin=origin)
        if ema:
            export_model(self.model.encoder, run / "exported-ema", form=self.form, state=ema, origin=origin)
            log.say(f"moving average of the weights in {exported}-ema")
        log.draw(lambda: draw_loss(run, "loss on masked patches", "val_loss"))
        log.say(f"pretrained encoder in {exported}; use it with\n\n{usage_example(self.model.encoder, exported)}")


def held_out_of(config: PretrainConfig, view: RandomView | NativeView) -> ImageSource:
    """The images that `val` names. Raises UserError where a few of them are not what the view takes."""
    source = by_page(open_images(config.val, config.out, config), view.reading, config.max_bad_images)
    check_fits(source, lambda file: view(file, np.random.default_rng(0)))
    return source


def thin_out(folder: Path, most: int) -> None:
    """Deletes pictures of a folder until there are `most`, those first whose neighbours are nearest to each other."""
    pictures = sorted((int(path.stem.removeprefix("step-")), path) for path in folder.glob("step-*.png"))
    while len(pictures) > most:
        apart = [pictures[i + 1][0] - pictures[i - 1][0] for i in range(1, len(pictures) - 1)]
        pictures.pop(1 + apart.index(min(apart)))[1].unlink()


def images_of(config: PretrainConfig, source: ImageSource | None = None) -> ImageSource:
    """The images that a config names, or those of a source that is open already, by pages where these are images."""
    source = source if source is not None else open_images(config.data, config.out, config)
    return by_page(source, asked_reading(config), config.max_bad_images)


def accelerated(config: PretrainConfig, ranks: Ranks) -> bool:
    """Whether the step is replayed from CUDA graphs: as asked for, or else wherever it can be.

    Raises UserError where CUDA graphs or compilation are asked for but can't be had.
    """
    device = ranks.device.type
    if config.cuda_graphs and (device != "cuda" or ranks.world > 1):
        where = f"on {device}" if device != "cuda" else "in several processes, which exchange gradients in between"
        raise UserError(f"`cuda_graphs` can't be used {where}: leave it out")
    if config.compile and shards(config, ranks):
        raise UserError("`compile` can't look into a model in shards: leave it out")
    backend = resolve_backend(config.backend, device)
    if not backend.compilable and (config.compile or config.cuda_graphs):
        raise UserError(f"backend {backend.name} can't be compiled or captured: leave out `compile` and `cuda_graphs`")
    if config.cuda_graphs is None:
        return device == "cuda" and ranks.world == 1 and backend.compilable
    return config.cuda_graphs
