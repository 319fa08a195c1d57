"""Fine-tuning of a dense classifier, on the kernels of pretraining: images and labels -> loss -> weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_fcmae import visualize
from sparse_fcmae.backends import resolve_backend
from sparse_fcmae.classifier import Classifier
from sparse_fcmae.config import FinetuneConfig, flag, image_size_of, shown_size
from sparse_fcmae.convert import classifier_example, export_model
from sparse_fcmae.data import AugmentedImages, BadImage, crop_share, make_loader, micro_batches
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.errors import Interrupted, UserError
from sparse_fcmae.formats.weights import read_weights
from sparse_fcmae.labelled import ClassFolder, open_splits
from sparse_fcmae.probes import Viewing, run_over
from sparse_fcmae.training import distributed
from sparse_fcmae.training.augment import Mixing, RandAugment
from sparse_fcmae.training.checkpoint import RunFolder, load_model, load_trainer
from sparse_fcmae.training.configure import configure
from sparse_fcmae.training.logging import RunLog
from sparse_fcmae.training.optim import adamw, layer_scale, load_optimizer, set_lr
from sparse_fcmae.training.progress import Progress, Schedule, stop_signals
from sparse_fcmae.training.recipes import complete
from sparse_fcmae.training.step import TrainStep

BETAS = (0.9, 0.999)
AUGMENTATION = 6  # beside the numbers in data and labelled
POSITIVE = (
    *("epochs", "batch_size", "micro_batch_size", "log_every", "save_every", "keep_checkpoints", "base_lr", "lr"),
    *("clip_grad", "every", "layer_decay", "min_crop", "labels_per_class"),
)
NOT_NEGATIVE = (
    *("warmup_epochs", "weight_decay", "seed", "num_workers", "max_bad_images", "min_lr"),
    *("label_smoothing", "mixup", "cutmix", "rand_augment", "random_erasing", "ema_decay", "drop_path"),
)
MOST = {"min_crop": 1, "random_erasing": 1, "rand_augment": 10}
LESS = {"label_smoothing": 1, "ema_decay": 1}
RECIPE = (
    *("base_lr", "weight_decay", "layer_decay", "layer_decay_type", "drop_path", "label_smoothing", "mixup", "cutmix"),
    *("rand_augment", "random_erasing", "min_crop", "ema_decay"),
)


def finetune(**options: Any) -> Path:
    """Fine-tunes and returns the folder of the exported classifier; options are those of `FinetuneConfig`.

    With `resume=True` only `out` is needed: what is left out is as the run was started with. Raises UserError for what
    the user can put right, and Interrupted, after saving a checkpoint, on Ctrl-C or SIGTERM.
    """
    config = configured(options)
    ranks = distributed.start(config.device)
    try:
        return train(config, ranks)
    finally:
        distributed.stop(ranks)


def configured(options: dict[str, Any]) -> FinetuneConfig:
    """The config that options mean, checked; touches nothing on the disk."""
    config = configure(FinetuneConfig, options, POSITIVE, NOT_NEGATIVE)
    for name, limit in (MOST | LESS).items():
        value = getattr(config, name)
        if value is not None and (value > limit or (value == limit and name in LESS)):
            raise UserError(f"{flag(name)} {value} must be {'less than' if name in LESS else 'at most'} {limit}")
    if bool(config.init) == config.from_scratch:
        raise UserError("give --init with the weights to fine-tune, or --from-scratch for none")
    if config.model not in SIZES:
        raise UserError(f"unknown model {config.model!r}: choose one of {', '.join(SIZES)}")
    for name in ("model", "in_chans", "stem_stride"):
        if config.init and name in options:
            raise UserError(f"{flag(name)} goes with --from-scratch alone: the weights of --init have their own")
    return config


def build(
    config: FinetuneConfig, classes: tuple[str, ...], checkpoint: Path | None = None
) -> tuple[Classifier, FinetuneConfig, list[str]]:
    """The classifier to start with, the config without open ends, and what there is to say about the weights.

    The head of the weights is kept where it is for these classes, or for as many whose names are not known. They are
    those of a run's checkpoint where there is one.
    """
    torch.manual_seed(config.seed)
    source = checkpoint or config.init
    if source is None:
        shape = {"name": config.model, "in_chans": config.in_chans, "stem_stride": config.stem_stride}
        weights, size, notes = None, (224, 224), ["starting from random weights"]
        if config.in_chans not in (1, 3):
            raise UserError(f"--in-chans {config.in_chans}: image files give 3 channels (colour) or 1 (greyscale)")
    else:
        weights = read_weights(source)
        weights.check_usable(source)
        shape = {**weights.architecture, "grn_scope": "image"}
        size, notes = shape.pop("image_size"), list(weights.notes)
    config = complete(config, shape["name"])
    size = image_size_of(config.image_size) if config.image_size else size
    config = replace(config, image_size=shown_size(size))
    options = {"image_size": size, "backend": config.backend, "drop_path": config.drop_path}
    model = Classifier(**shape, **options, num_classes=len(classes))
    if weights:
        fits = weights.num_classes == len(classes) and weights.classes in (None, classes)
        model.load_state_dict(weights.without("decoder", *([] if fits else ["head"])), strict=False)
        notes.insert(0, f"starting from the {'encoder and head' if fits else 'encoder'} of {source}")
        notes += [] if fits else [f"new head for {len(classes)} classes"]
    if config.freeze_encoder:
        model.requires_grad_(False)
        model.norm.requires_grad_(True)
        model.head.requires_grad_(True)
    return model, config, notes


def train(config: FinetuneConfig, ranks: distributed.Ranks) -> Path:
    """The run of a checked config, on this rank."""
    device, run = ranks.device, RunFolder(config.out, FinetuneConfig)
    folder, held = open_splits(config.data, config.val_split, config.seed)
    for classes in (folder.root, held.root):
        if Path(config.out).resolve().is_relative_to(classes.resolve()):
            raise UserError(f"--out {config.out} lies among the class folders of {classes}: choose another")
    if config.labels_per_class:
        folder = folder.few(config.labels_per_class, config.seed)
    checkpoint = run.latest() if config.resume else None
    model, config, notes = build(config, folder.classes, checkpoint)
    size = image_size_of(config.image_size)
    schedule = Schedule.of(config, len(folder), ranks.world, warmup_epochs=config.warmup_epochs, min_lr=config.min_lr)
    share, steps = schedule.share, schedule.steps
    mixing = {name: getattr(config, name) for name in ("random_erasing", "mixup", "cutmix")}
    mix = Mixing(len(folder.classes), **mixing)

    model.to(device).train()
    backend = resolve_backend(config.backend, device.type)
    scale = layer_scale(config.layer_decay, SIZES[model.name][0], config.layer_decay_type == "group")
    optimizer = adamw(model, config.weight_decay, BETAS, scale=scale)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None

    start, bad = 0, {}
    if checkpoint:
        load_model(checkpoint, model)
        trainer = load_trainer(checkpoint)
        load_optimizer(optimizer, trainer["optimizer"])
        if ema:
            ema.load_state_dict(trainer["ema"])
        start, bad = trainer["step"], trainer["bad"]
        if trainer["images"] != folder.fingerprint:
            raise UserError(f"the images in {config.data} are not those that the run in {config.out} was started with")
    bf16 = distributed.choose_dtype(config.dtype, device, config.backend) == torch.bfloat16
    ranks.barrier()  # every rank has found the folder in order before one writes to it
    if ranks.main:
        run.begin(replace(config, dtype="bf16" if bf16 else "fp32"), classes=folder.classes)
    ranks.barrier()

    workers = distributed.cores_per_rank() if config.num_workers is None else config.num_workers
    augment = RandAugment(config.rand_augment) if config.rand_augment else None
    dataset = AugmentedImages(folder, size, model.in_chans, config.seed, least=config.min_crop, augment=augment)
    batches = micro_batches(
        *(len(folder), config.batch_size, range(start, steps), config.seed),
        *(ranks.rank, ranks.world, config.micro_batch_size),
    )
    loader = iter(make_loader(dataset, batches, workers, pin_memory=device.type == "cuda"))
    view = Viewing(size, model.in_chans, crop_share(size), device, bf16, config.micro_batch_size, workers)
    mine = held.take(range(ranks.rank, len(held), ranks.world))
    trained: nn.Module = model
    if ranks.world > 1:
        trained = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            images, targets = mix(pixels, labels)
        return F.cross_entropy(trained(images).float(), targets, label_smoothing=config.label_smoothing)

    work = TrainStep(loss_of, trained, optimizer, share=share, clip_grad=config.clip_grad, bf16=bf16)

    log = RunLog(run.path, start, steps, ranks.main, evaluating=True)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.say(
        f"{model.name} on {device}, backend {backend.name}, {'bf16' if bf16 else 'fp32'}, {parameters / 1e6:.1f} M "
        f"parameters to train; {len(folder)} images of {len(folder.classes)} classes, {len(held)} held out, "
        f"{schedule.describe(config.batch_size)}"
    )
    if config.resume:
        log.say(f"resumed from {checkpoint}" if checkpoint else "no checkpoint to resume from yet: starting at step 0")
    for note in [] if checkpoint else notes:
        log.say(note)
    log.say("recipe: " + ", ".join(f"{flag(name)} {getattr(config, name)}" for name in RECIPE))
    progress = Progress(config, schedule, folder, log, ranks, bad)
    left_out: set[str] = set()

    def look(step: int) -> None:
        values, unreadable = measure({"": model} | ({"ema_": ema.module} if ema else {}), mine, view, ranks)
        for file, reason in unreadable:
            if file not in left_out:
                left_out.add(file)
                log.say(f"unreadable, left out of the evaluation: {file}: {reason}")
        if ranks.main:
            log.evaluation(step, step / schedule.per_epoch, values)

    def save(step: int) -> None:
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"the weights are not finite after step {step}: lower --lr or give --clip-grad 1")
        log.sync()
        state = {"step": step, "optimizer": optimizer.state_dict(), "bad": bad, "images": folder.fingerprint}
        state |= {"ema": ema.state_dict()} if ema else {}
        run.save(step, model.state_dict(), state, config.keep_checkpoints)

    try:
        with stop_signals(ranks.world) as stopped:
            for step in range(start, steps):
                set_lr(optimizer, lr := schedule.lr(step))
                for first in range(0, share, config.micro_batch_size):
                    batch = next(loader)
                    progress.take(batch, min(config.micro_batch_size, share - first))
                    # whatever is drawn for a micro-batch follows from its place in the global batch
                    torch.manual_seed(_seed(config.seed, step, ranks.rank * share + first))
                    last = first + config.micro_batch_size >= share
                    work.add(batch.pixels, folder.labels[batch.index], last=last)
                progress.done(work.finish(), lr)
                if ema:
                    ema.update_parameters(model)
                done, stopping = step + 1, stopped()
                saving = done % schedule.save_every == 0 or done == steps or stopping
                looking = done % (config.every * schedule.per_epoch) == 0 or done == steps
                if saving or looking or done % config.log_every == 0 or step == start:
                    progress.flush(done)
                if looking:
                    look(done)
                if saving and ranks.main:
                    save(done)
                if stopping:
                    log.say(f"stopped at step {done}; go on with --out {config.out} --resume")
                    raise Interrupted
        exported = run.path / "exported"
        if ranks.main:
            export_model(model.cpu(), exported, folder.classes)
            if ema:
                export_model(ema.module.cpu(), run.path / "exported-ema", folder.classes)
            log.draw(lambda: visualize.draw_loss(run.path / "metrics.jsonl", run.path / "loss.png", "loss"))
            log.draw(lambda: visualize.draw_accuracy(run.path / "evaluations.jsonl", run.path / "accuracy.png"))
            average = f", the moving average of its weights in {exported}-ema" if ema else ""
            example = classifier_example(model, exported, config.data)
            log.say(f"classifier in {exported}{average}; use it with\n\n{example}")
        ranks.barrier()
    finally:
        log.close()
    return exported


def measure(
    models: dict[str, nn.Module], folder: ClassFolder, view: Viewing, ranks: distributed.Ranks
) -> tuple[dict[str, float], list[BadImage]]:
    """top1, top5 and loss, the cross-entropy, of models, each after its name, in one pass over all ranks' images
    together, of which `folder` holds this rank's; and the unreadable ones, which are left out."""
    sums, unreadable = torch.zeros(len(models), 4, dtype=torch.float64), []
    if len(folder):
        for model in models.values():
            model.eval()
        outputs, index, unreadable = run_over(
            folder, lambda images: torch.stack([model(images) for model in models.values()], 1), view
        )
        for model in models.values():
            model.train()
        labels = folder.labels[index]
        for i, logits in enumerate(outputs.unbind(1)):
            right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[i] = torch.tensor([right[:, 0].sum(), right.sum(), loss, len(labels)])
    values = {}
    for name, (top1, top5, loss, images) in zip(models, torch.stack(ranks.gather(sums)).sum(0).tolist(), strict=True):
        values |= {f"{name}top1": top1 / images, f"{name}top5": top5 / images, f"{name}loss": loss / images}
    return values, [entry for entries in ranks.gather(unreadable) for entry in entries]


def _seed(seed: int, *place: int) -> int:
    return int(np.random.SeedSequence((seed, AUGMENTATION, *place)).generate_state(1, np.uint64)[0]) >> 1
