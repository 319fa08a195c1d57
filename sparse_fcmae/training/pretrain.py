"""FCMAE pretraining: images -> masks -> loss -> weights, one linear loop for one process or many."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
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
from sparse_fcmae.data import AugmentedImages, BadImage, ImageFolder, make_loader, micro_batches
from sparse_fcmae.errors import Interrupted, UserError
from sparse_fcmae.fcmae import FCMAE
from sparse_fcmae.training import distributed
from sparse_fcmae.training.checkpoint import RunFolder, check_same, load_model, load_trainer
from sparse_fcmae.training.logging import RunLog
from sparse_fcmae.training.optim import adamw, cosine_lr, load_optimizer, set_lr
from sparse_fcmae.training.step import GraphedTrainStep, TrainStep

BETAS = (0.9, 0.95)
WARMUP_SHARE = 0.05
MASKS = 3  # beside data.CROPS and data.ORDER
DRAWN = 8  # images in a reconstruction picture
POSITIVE = (
    *("epochs", "batch_size", "micro_batch_size", "log_every", "save_every", "keep_checkpoints", "base_lr", "lr"),
    *("clip_grad", "mask_patch_size", "mask_grid", "decoder_dim", "decoder_depth"),
)
MODEL_OPTIONS = (
    *("in_chans", "mask_ratio", "backend", "stem_stride", "grn_scope", "mask_patch_size", "mask_grid"),
    *("norm_pix_loss", "decoder_dim", "decoder_depth"),
)


def pretrain(**options: Any) -> Path:
    """Pretrains and returns the folder of the exported dense encoder; options are those of `PretrainConfig`.

    With `resume=True` only `out` is needed: what is left out is as the run was started with. Raises UserError for what
    the user can put right, and Interrupted, after saving a checkpoint, on Ctrl-C or SIGTERM.
    """
    config = configure(options)
    ranks = distributed.start(config.device)
    try:
        return train(config, ranks)
    finally:
        distributed.stop(ranks)


def configure(options: dict[str, Any]) -> PretrainConfig:
    """The config that options mean, checked; touches nothing on the disk."""
    known = [f.name for f in fields(PretrainConfig)]
    for name in options.keys() - set(known):
        raise TypeError(f"pretrain() got an unexpected option {name!r}")
    options = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    if "image_size" in options:
        options["image_size"] = "x".join(map(str, dict.fromkeys(image_size_of(options["image_size"]))))
    if "data" in options:
        options["data"] = os.path.abspath(options["data"])  # so that a run can be resumed from any folder
    resume = options.get("resume", False)
    run = RunFolder(options.get("out", PretrainConfig.out))
    run.check(resume, options.get("overwrite", False))
    if resume:
        saved = PretrainConfig(**{k: v for k, v in (run.saved_config() or {}).items() if k in known})
        if options.get("dtype") == "auto":  # a run stays with what it was started with
            del options["dtype"]
        config = replace(saved, **options)
        check_same(config, saved)
    elif "data" not in options:
        raise UserError("--data is missing: name the folder with the images")
    else:
        config = PretrainConfig(**options)
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} must be greater than 0, not {value}")
    for name in ("warmup_epochs", "weight_decay", "seed", "num_workers", "max_bad_images", "mask_ratio"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 2**32:
            raise UserError(f"{flag(name)} must be 0 or more, not {value}")
    if config.in_chans not in (1, 3):
        raise UserError(f"--in-chans {config.in_chans}: image files give 3 channels (colour) or 1 (greyscale)")
    return config


def train(config: PretrainConfig, ranks: distributed.Ranks) -> Path:
    """The run of a checked config, on this rank."""
    device, size = ranks.device, image_size_of(config.image_size)
    run, folder = RunFolder(config.out), ImageFolder(config.data, without=config.out)
    if config.batch_size > len(folder):
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {len(folder)} images in {config.data}: "
            f"choose {len(folder)} or less"
        )
    if config.batch_size % ranks.world:
        raise UserError(f"--batch-size {config.batch_size} can't be shared evenly by {ranks.world} processes")
    if config.cuda_graphs and (device.type != "cuda" or ranks.world > 1):
        where = f"on {device.type}" if device.type != "cuda" else "in several processes"
        raise UserError(f"--cuda-graphs can't be used {where}: leave it out")
    share, per_epoch = config.batch_size // ranks.world, len(folder) // config.batch_size
    steps = config.epochs * per_epoch
    warmup_epochs = config.warmup_epochs if config.warmup_epochs is not None else WARMUP_SHARE * config.epochs
    warmup = min(steps, round(warmup_epochs * per_epoch))
    peak_lr = config.lr if config.lr is not None else config.base_lr * config.batch_size / 256
    save_every = config.save_every or per_epoch

    torch.manual_seed(config.seed)
    options = {name: getattr(config, name) for name in MODEL_OPTIONS}
    model = FCMAE(config.model, image_size=size, **options).to(device)
    backend = resolve_backend(config.backend, device.type)
    optimizer = adamw(model, config.weight_decay, BETAS, capturable=config.cuda_graphs)

    start, bad = 0, {}
    checkpoint = run.latest() if config.resume else None
    if checkpoint:
        load_model(checkpoint, model)
        trainer = load_trainer(checkpoint)
        load_optimizer(optimizer, trainer["optimizer"])
        start, bad = trainer["step"], trainer["bad"]
        if trainer["images"] != folder.fingerprint:
            raise UserError(f"the images in {config.data} are not those that the run in {config.out} was started with")
    bf16 = choose_dtype(config.dtype, device) == torch.bfloat16
    config = replace(config, dtype="bf16" if bf16 else "fp32")
    ranks.barrier()  # every rank has found the folder in order before one writes to it
    if ranks.main:
        run.begin(config)
    ranks.barrier()

    dataset = AugmentedImages(folder, size, config.in_chans, config.seed)
    batches = micro_batches(
        *(len(folder), config.batch_size, range(start, steps), config.seed),
        *(ranks.rank, ranks.world, config.micro_batch_size),
    )
    workers = _cores_per_rank() if config.num_workers is None else config.num_workers
    loader = iter(make_loader(dataset, batches, workers, pin_memory=device.type == "cuda"))
    trained: nn.Module = torch.compile(model, fullgraph=True, dynamic=False) if config.compile else model
    if ranks.world > 1:
        trained = DistributedDataParallel(trained, device_ids=[device.index] if device.type == "cuda" else None)
    kind = GraphedTrainStep if config.cuda_graphs else TrainStep
    work = kind(trained, optimizer, kept=model.kept(size), share=share, clip_grad=config.clip_grad, bf16=bf16)

    log = RunLog(run.path, start, steps, ranks.main)
    parameters = sum(p.numel() for p in model.parameters())
    log.say(
        f"{config.model} on {device}, backend {backend.name}, {'bf16' if bf16 else 'fp32'}, "
        f"{parameters / 1e6:.1f} M parameters with the decoder; {len(folder)} images, {per_epoch} steps of "
        f"{config.batch_size} an epoch, {steps} in all, {warmup} of warm-up, peak lr {peak_lr:.3g}"
    )
    if config.resume:
        log.say(f"resumed from {checkpoint}" if checkpoint else "no checkpoint to resume from yet: starting at step 0")
    drawn = visualize.sample_images(folder, DRAWN if ranks.main else 0, size, config.in_chans).to(device)
    losses, lrs, new_bad = [], [], []

    def flush(step: int) -> None:
        """Takes the losses off the device, shares what ranks alone know, and records it."""
        nonlocal losses, lrs, new_bad
        values = ranks.mean(torch.stack(losses)).tolist()
        log.steps(step, 1 / per_epoch, values, lrs, len(values) * config.batch_size)
        for entry in (entry for entries in ranks.gather(new_bad) for entry in entries):
            if entry.file not in bad:
                bad[entry.file] = entry.reason
                log.say(f"unreadable, replaced by another image: {entry.file}: {entry.reason}")
        losses, lrs, new_bad = [], [], []
        if len(bad) > config.max_bad_images * len(folder):
            raise UserError(
                f"{len(bad)} of {len(folder)} images are unreadable, such as {next(iter(bad))}: raise --max-bad-images "
                f"and --resume, or remove those that {run.path / 'train.log'} names and start anew"
            )

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
        with stop_signals(ranks.world) as stopped:
            for step in range(start, steps):
                lrs.append(cosine_lr(step, steps, warmup, peak_lr))
                set_lr(optimizer, lrs[-1])
                masks = model.draw_mask(config.batch_size, size, generator=_generator(config.seed, step, device))
                masks = masks[ranks.rank * share : (ranks.rank + 1) * share]
                micro_masks = masks.split(config.micro_batch_size)
                for i, micro in enumerate(micro_masks, 1):
                    batch = next(loader)
                    new_bad += batch.bad
                    if not len(batch.pixels):
                        raise _nothing_readable(batch.bad)
                    work.add(batch.pixels, micro, last=i == len(micro_masks))
                losses.append(work.finish())
                done, stopping = step + 1, stopped()
                saving = done % save_every == 0 or done == steps or stopping
                if saving or done % config.log_every == 0 or step == start:
                    flush(done)
                if saving and ranks.main:
                    save(done)
                if stopping:
                    log.say(f"stopped at step {done}; go on with --out {config.out} --resume")
                    raise Interrupted
        exported = run.path / "exported"
        if ranks.main:
            export_model(model.encoder.cpu(), exported)
            draw_curve(run.path, log)
            log.say(f"pretrained encoder in {exported}; use it with\n\n{usage_example(model.encoder, exported)}")
        ranks.barrier()
    finally:
        log.close()
    return exported


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of a --dtype flag: "auto" is bfloat16 where the device multiplies it in hardware."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif name == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        name = "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


@contextmanager
def stop_signals(world: int) -> Iterator[Callable[[], bool]]:
    """Yields a function telling whether Ctrl-C or SIGTERM came: of one process, as many could not agree on a step.

    A second one raises KeyboardInterrupt at once.
    """
    received = []

    def stop(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    if world > 1 or threading.current_thread() is not threading.main_thread():  # others can't have handlers
        yield lambda: False
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def draw_curve(run: Path, log: RunLog) -> None:
    """Draws loss.png where matplotlib is installed."""
    try:
        visualize.draw_loss(run / "metrics.jsonl", run / "loss.png")
    except ImportError:
        log.say("loss.png is not drawn, as matplotlib is not installed (extra: plots)")


def _generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Masks of a step depend on seed, step and kind of device alone."""
    state = np.random.SeedSequence((seed, MASKS, step)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


def _nothing_readable(bad: list[BadImage]) -> UserError:
    return UserError(f"no readable image found in many tries: {bad[-1].file}: {bad[-1].reason}; check --data")


def _cores_per_rank() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
