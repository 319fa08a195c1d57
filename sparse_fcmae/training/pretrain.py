"""FCMAE pretraining: images -> masks -> loss -> weights, one linear loop for one process or many."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_fcmae import visualize
from sparse_fcmae.backends import resolve_backend
from sparse_fcmae.config import PretrainConfig, flag, image_size_of
from sparse_fcmae.convert import export_model, usage_example
from sparse_fcmae.data import AugmentedImages, ImageFolder, crop_share, make_loader, micro_batches
from sparse_fcmae.encoder import SIZES, SparseEncoder
from sparse_fcmae.errors import Interrupted, UserError
from sparse_fcmae.fcmae import FCMAE
from sparse_fcmae.files import writing
from sparse_fcmae.formats.weights import read_weights
from sparse_fcmae.labelled import open_splits
from sparse_fcmae.probes import Viewing, features_of, nearest_neighbours
from sparse_fcmae.training import distributed
from sparse_fcmae.training.checkpoint import RunFolder, load_model, load_trainer
from sparse_fcmae.training.configure import configure
from sparse_fcmae.training.logging import RunLog
from sparse_fcmae.training.optim import adamw, load_optimizer, set_lr
from sparse_fcmae.training.progress import Progress, Schedule, stop_signals
from sparse_fcmae.training.step import GraphedTrainStep, TrainStep, fcmae_loss

BETAS = (0.9, 0.95)
WARMUP_SHARE = 0.05
MASKS = 3  # beside data.CROPS and data.ORDER
DRAWN = 8  # images in a reconstruction picture
POSITIVE = (
    *("epochs", "batch_size", "micro_batch_size", "log_every", "save_every", "keep_checkpoints", "base_lr", "lr"),
    *("clip_grad", "mask_patch_size", "mask_grid", "decoder_dim", "decoder_depth", "every"),
)
NOT_NEGATIVE = ("warmup_epochs", "weight_decay", "seed", "num_workers", "max_bad_images", "mask_ratio")
MODEL_OPTIONS = (
    *("in_chans", "mask_ratio", "backend", "stem_stride", "grn_scope", "mask_patch_size", "mask_grid"),
    *("norm_pix_loss", "decoder_dim", "decoder_depth"),
)


def pretrain(**options: Any) -> Path:
    """Pretrains and returns the folder of the exported dense encoder; options are those of `PretrainConfig`.

    With `resume=True` only `out` is needed: what is left out is as the run was started with. Raises UserError for what
    the user can put right, and Interrupted, after saving a checkpoint, on Ctrl-C or SIGTERM.
    """
    config = configured(options)
    ranks = distributed.start(config.device)
    try:
        return train(config, ranks)
    finally:
        distributed.stop(ranks)


def configured(options: dict[str, Any]) -> PretrainConfig:
    """The config that options mean, checked; touches nothing on the disk."""
    if options.get("init") and not options.get("resume"):  # what is not given is as these weights are
        found = read_weights(options["init"], whole=True).architecture
        own = {"model": found["name"], **{k: found[k] for k in ("image_size", "in_chans", "stem_stride")}}
        options = own | options
    config = configure(PretrainConfig, options, POSITIVE, NOT_NEGATIVE)
    if config.model not in SIZES:
        raise UserError(f"unknown model {config.model!r}: choose one of {', '.join(SIZES)}")
    if config.in_chans not in (1, 3):
        raise UserError(f"--in-chans {config.in_chans}: image files give 3 channels (colour) or 1 (greyscale)")
    return config


def train(config: PretrainConfig, ranks: distributed.Ranks) -> Path:
    """The run of a checked config, on this rank."""
    device, size = ranks.device, image_size_of(config.image_size)
    run, folder = RunFolder(config.out), ImageFolder(config.data, without=config.out)
    warmup_epochs = config.warmup_epochs if config.warmup_epochs is not None else WARMUP_SHARE * config.epochs
    schedule = Schedule.of(config, len(folder), ranks.world, warmup_epochs=warmup_epochs)
    if config.cuda_graphs and (device.type != "cuda" or ranks.world > 1):
        where = f"on {device.type}" if device.type != "cuda" else "in several processes"
        raise UserError(f"--cuda-graphs can't be used {where}: leave it out")
    share, steps = schedule.share, schedule.steps

    torch.manual_seed(config.seed)
    options = {name: getattr(config, name) for name in MODEL_OPTIONS}
    model = FCMAE(config.model, image_size=size, **options)
    checkpoint = run.latest() if config.resume else None
    notes = load_weights(model, config.init) if config.init and not checkpoint else []
    model.to(device)
    backend = resolve_backend(config.backend, device.type)
    if not backend.compilable and (config.compile or config.cuda_graphs):
        raise UserError(f"backend {backend.name} can't be compiled or captured: leave out --compile and --cuda-graphs")
    optimizer = adamw(model, config.weight_decay, BETAS, capturable=config.cuda_graphs)
    neighbours = Neighbours(config, size, ranks) if config.knn else None

    start, bad = 0, {}
    if checkpoint:
        load_model(checkpoint, model)
        trainer = load_trainer(checkpoint)
        load_optimizer(optimizer, trainer["optimizer"])
        start, bad = trainer["step"], trainer["bad"]
        if trainer["images"] != folder.fingerprint:
            raise UserError(f"the images in {config.data} are not those that the run in {config.out} was started with")
    bf16 = distributed.choose_dtype(config.dtype, device, config.backend) == torch.bfloat16
    config = replace(config, dtype="bf16" if bf16 else "fp32")
    ranks.barrier()  # every rank has found the folder in order before one writes to it
    if ranks.main:
        run.begin(config)
        with writing(run.path):
            (run.path / "reconstructions").mkdir(exist_ok=True)
    ranks.barrier()

    dataset = AugmentedImages(folder, size, config.in_chans, config.seed)
    batches = micro_batches(
        *(len(folder), config.batch_size, range(start, steps), config.seed),
        *(ranks.rank, ranks.world, config.micro_batch_size),
    )
    workers = distributed.cores_per_rank() if config.num_workers is None else config.num_workers
    loader = iter(make_loader(dataset, batches, workers, pin_memory=device.type == "cuda"))
    trained: nn.Module = torch.compile(model, fullgraph=True, dynamic=False) if config.compile else model
    if ranks.world > 1:
        trained = DistributedDataParallel(trained, device_ids=[device.index] if device.type == "cuda" else None)
    kind = GraphedTrainStep if config.cuda_graphs else TrainStep
    loss_of, clip_grad = fcmae_loss(trained, model.kept(size)), config.clip_grad
    work = kind(loss_of, trained, optimizer, share=share, clip_grad=clip_grad, bf16=bf16)

    log = RunLog(run.path, start, steps, ranks.main, evaluating=bool(config.knn))
    parameters = sum(p.numel() for p in model.parameters())
    log.say(
        f"{config.model} on {device}, backend {backend.name}, {config.dtype}, {parameters / 1e6:.1f} M parameters with "
        f"the decoder; {len(folder)} images, {schedule.describe(config.batch_size)}"
    )
    if config.resume:
        log.say(f"resumed from {checkpoint}" if checkpoint else "no checkpoint to resume from yet: starting at step 0")
    for note in notes:
        log.say(note)
    drawn = visualize.sample_images(folder, DRAWN if ranks.main else 0, size, config.in_chans).to(device)
    progress = Progress(config, schedule, folder, log, ranks, bad)

    def look(step: int) -> None:
        top1 = neighbours.top1(model.encoder) if neighbours else None
        if top1 is not None and ranks.main:
            log.evaluation(step, step / schedule.per_epoch, {"knn_top1": top1})

    def save(step: int) -> None:
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"the weights are not finite after step {step}: lower --lr or give --clip-grad 1")
        log.sync()
        state = {"step": step, "optimizer": optimizer.state_dict(), "bad": bad, "images": folder.fingerprint}
        run.save(step, model.state_dict(), state, config.keep_checkpoints)
        if len(drawn):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                picture = visualize.reconstruct(model, drawn, torch.Generator().manual_seed(config.seed))
            visualize.save_picture(picture, run.path / "reconstructions" / f"step-{step:08d}.png")

    try:
        if not start:
            look(0)  # what there is to be better than
        with stop_signals(ranks.world) as stopped:
            for step in range(start, steps):
                set_lr(optimizer, lr := schedule.lr(step))
                masks = model.draw_mask(config.batch_size, size, generator=_generator(config.seed, step, device))
                masks = masks[ranks.rank * share : (ranks.rank + 1) * share]
                micro_masks = masks.split(config.micro_batch_size)
                for i, micro in enumerate(micro_masks, 1):
                    batch = next(loader)
                    progress.take(batch, len(micro))
                    work.add(batch.pixels, micro, last=i == len(micro_masks))
                progress.done(work.finish(), lr)
                done, stopping = step + 1, stopped()
                saving = done % schedule.save_every == 0 or done == steps or stopping
                looking = config.knn and (done % (config.every * schedule.per_epoch) == 0 or done == steps)
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
            export_model(model.encoder.cpu(), exported)
            log.draw(lambda: visualize.draw_loss(run.path / "metrics.jsonl", run.path / "loss.png"))
            log.say(f"pretrained encoder in {exported}; use it with\n\n{usage_example(model.encoder, exported)}")
        ranks.barrier()
    finally:
        log.close()
    return exported


def load_weights(model: FCMAE, path: str) -> list[str]:
    """Has a model go on from any checkpoint's encoder and, where it has a decoder of the same shape, from that too.

    Returns what there is to say about it. Raises UserError where it is of another architecture.
    """
    weights = read_weights(path, whole=True)
    weights.check_usable(path)
    for name in ("name", "in_chans", "stem_stride"):
        there, here = weights.architecture[name], getattr(model.encoder, name)
        if there != here:
            name = "--model" if name == "name" else flag(name)
            raise UserError(f"--init {path} has {name} {there}, not {here}: give {name} {there}")
    model.encoder.load_state_dict(weights.without("norm", "head", "decoder"))
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")}
    decoder = {key: value for key, value in weights.state.items() if key in own}
    fits = {key: value.shape for key, value in decoder.items()} == {key: value.shape for key, value in own.items()}
    if fits:
        model.load_state_dict(decoder, strict=False)
    what = "encoder and decoder" if fits else "encoder"
    return [f"going on from the {what} of {path}", *([] if fits else ["new decoder"]), *weights.notes]


class Neighbours:
    """k-NN accuracy of an encoder on a labelled folder, its training and its held-out images shared by the ranks."""

    def __init__(self, config: PretrainConfig, size: tuple[int, int], ranks: distributed.Ranks) -> None:
        folders = open_splits(config.knn, None, config.seed)
        self.parts = [folder.take(range(ranks.rank, len(folder), ranks.world)) for folder in folders]
        bf16 = distributed.choose_dtype(config.dtype, ranks.device, config.backend) == torch.bfloat16
        workers = distributed.cores_per_rank() if config.num_workers is None else config.num_workers
        share, batch = crop_share(size), config.micro_batch_size
        self.view = Viewing(size, config.in_chans, share, ranks.device, bf16, batch, workers)
        self.ranks = ranks

    def top1(self, encoder: SparseEncoder) -> float:
        """The share of the held-out images whose class most of their neighbours have. To be called by all ranks."""
        found = []
        for part in self.parts:
            features, labels, _ = features_of(part, encoder, self.view)
            shares = self.ranks.gather((features, labels))
            found += [torch.cat(tensors) for tensors in zip(*shares, strict=True)]
        features, labels, queries, truth = found
        return (nearest_neighbours(features, labels, queries) == truth).float().mean().item()


def _generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Masks of a step depend on seed, step and kind of device alone."""
    state = np.random.SeedSequence((seed, MASKS, step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)
