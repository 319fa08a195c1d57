"""The training loop, one for every task, on one process or many."""

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from sparse_fcmae.data.batches import Batch, Loader, make_loader, micro_batches
from sparse_fcmae.data.sources.contents import contents_of, other_contents
from sparse_fcmae.runtime.checkpoint_folder import damaged_checkpoints, is_exported, newest_checkpoint
from sparse_fcmae.runtime.device import loader_processes
from sparse_fcmae.runtime.energy import EnergyMeter
from sparse_fcmae.runtime.errors import Interrupted, UserError
from sparse_fcmae.runtime.options import changes
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.training.best import Best
from sparse_fcmae.training.checkpoint import Checkpoints, check_images, restore, to_go_on
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.lr_range import what_it_showed
from sparse_fcmae.training.optim import set_lr
from sparse_fcmae.training.parallel import averaging, shards, spread
from sparse_fcmae.training.prefetch import prefetched
from sparse_fcmae.training.progress import Progress
from sparse_fcmae.training.schedule import Schedule
from sparse_fcmae.training.signals import stop_signals
from sparse_fcmae.training.step import TrainStep
from sparse_fcmae.training.task import Task
from sparse_fcmae.training.waiting import Waiting
from sparse_fcmae.training.watch import Watch
from sparse_fcmae.training.writers import Writers, check_trackers


def train(task: Task) -> Path:
    """Trains a task's model from its run's newest checkpoint, or from the start; returns RUN/exported.

    Raises UserError for what the user can put right, and Interrupted, after saving a checkpoint, on the signals of
    `runtime.signals`.
    """
    config, ranks = task.config, task.ranks
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS is refused
        torch.use_deterministic_algorithms(True)
    run = RunFolder(config.out, config.kind)
    if config.resume:
        ranks.by_main(lambda: check_images(run, task))  # before the schedule, which other images would not fit either
    if len(set(ranks.gather(task.source.fingerprint))) > 1:
        raise UserError(f"the processes see different images in {config.data}: are all files there, on each machine?")
    schedule = Schedule.of(config, len(task.source), ranks.world, task.min_lr)
    task.plan(schedule)
    changed = changes(run.saved_options() or {}, config) if config.resume else []
    optimizer = task.optimizer()
    best = Best(config, task.measures, task.judge)
    ranks.by_main(lambda: check_trackers(config.log_to))
    ranks.by_main(lambda: run.hold(config))
    checkpoint = ranks.by_main(lambda: newest_checkpoint(run.path)) if config.resume else None
    start, unreadable = restore(checkpoint, task, optimizer, best) if checkpoint else (0, {})
    if start > schedule.steps:
        longer = "max_steps" if config.max_steps else "epochs"
        raise UserError(f"the run in {config.out} has done {start} steps, more than {schedule.steps}: raise `{longer}`")
    finished = start == schedule.steps or best.ended
    if config.resume == "auto" and finished and ranks.by_main(lambda: is_exported(run.path)):
        if ranks.main:
            why = f" ({best.why()})" if best.ended else ""
            print(f"the run in {config.out} is finished: it is in {run.path / 'exported'}{why}")
        return run.path / "exported"
    loader, notes = _loader(task, schedule, start)
    trackers, swapped = _begin(task, run, start)
    log = RunLog(run.path, start, schedule.steps, ranks.main, trackers)
    meter = EnergyMeter() if ranks.main else None
    waiting = Waiting(log.say, str(task.source))
    watch = Watch(ranks, waiting, config.hang_minutes, start, log.last_words)
    with log, waiting, watch, stop_signals(ranks, waiting, start) as stop:
        batches = prefetched(iter(loader), ranks.device)
        runner = _runner(task, optimizer, schedule)
        most = runner.most
        progress = Progress(config, schedule, task.source, log, ranks, unreadable, start, task.flops)
        checkpoints = Checkpoints(run, task, optimizer, schedule, log, unreadable, start, best)
        log.say(f"{task.description}; {len(task.source)} samples, {schedule}")
        going_on = _going_on(run.path, checkpoint, best, last=finished) if config.resume and ranks.main else []
        for note in (*going_on, *swapped, *changed, *spread(config, ranks), *task.notes, *notes, str(checkpoints)):
            log.say(note)
        with checkpoints.kept(progress), loader.explained():
            if not start and task.evaluates_untrained:
                with watch.rest():
                    log.evaluation(0, 0.0, ranks.gather(task.evaluate(log, 0))[0])
            for step in range(start, start if finished else schedule.steps):
                set_lr(optimizer, lr := schedule.lr(step))
                for first, images in schedule.micro_batches():
                    batch = waiting.for_next(batches)
                    progress.take(batch, images)
                    last = first + images == schedule.images_per_rank
                    runner.add(*task.inputs(batch, step, first), last=last)
                progress.step_done(runner.finish(), lr)
                task.after_step()
                watch.step = done = step + 1

                stopping = stop.agreed(done)
                evaluating = task.evaluates and schedule.evaluates_after(done)
                saving = stopping or checkpoints.asked_for(done) or (ranks.world == 1 and checkpoints.due(done))
                if evaluating or saving or done % config.log_every == 0 or step == start:
                    with checkpoints.withheld() if evaluating else nullcontext():
                        progress.flush(done, waiting.take_seconds())
                        if evaluating:
                            with watch.rest():
                                values = ranks.gather(task.evaluate(log, done))[0]
                            log.evaluation(done, schedule.epoch(done), values)
                            log.verdict(task.verdict(run.path) if ranks.main else None)
                            saving |= best.look(done, values) or best.ended
                    if runner.most < most:
                        most = runner.most
                        log.say(
                            f"{most} images at once from here on, as more do not fit into the memory of {ranks.device}"
                        )
                    if meter:
                        meter.read()
                    if checkpoints.agreed(done) or saving:
                        checkpoints.save(done)
                if stopping and done < schedule.steps:
                    checkpoints.written()
                    log.say(to_go_on(config, done))
                    ranks.barrier()  # or torchrun would end the main rank, which saves, as others have ended
                    raise Interrupted
                if best.ended:
                    log.say(f"stopped: {best.why()}")
                    break
        with watch.rest():
            _end(task, checkpoints, log)
            log.say(progress.summary(meter))
            ranks.barrier()
    return run.path / "exported"


def _runner(task: Task, optimizer: torch.optim.Optimizer, schedule: Schedule) -> TrainStep:
    """What takes the steps of a task on this rank."""
    several_gpus = task.ranks.world > 1 and task.ranks.device.type == "cuda"
    if several_gpus and not shards(task.config, task.ranks):  # of which none can run by itself
        task.ranks.main_first(lambda: _rehearse(task, optimizer, schedule))
    return task.step_type(
        averaging(task.objective, task.ranks),
        optimizer,
        images_per_rank=schedule.images_per_rank,
        clip_grad=task.config.clip_grad,
        bf16=task.config.dtype == "bf16",
        divides=task.divides and task.ranks.world == 1,
    )


def _rehearse(task: Task, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Runs a micro-batch of blank images, which changes nothing, so that kernels are compiled and their tiles timed.

    They are kept on the disk. So one rank does it, and no rank makes the others wait for it in a collective.
    """
    view, images = task.dataset().view, min(schedule.micro_batch_size, schedule.images_per_rank)
    pixels = torch.from_numpy(np.zeros((images, *view.size, view.reading.in_chans), view.reading.dtype))
    inputs = task.inputs(Batch(pixels, torch.zeros(images, dtype=torch.int64), []), 0, 0)
    step = TrainStep(task.objective, optimizer, images_per_rank=images, bf16=task.config.dtype == "bf16")
    statistics = [value.clone() for value in task.model.buffers()]
    step.add(*inputs, last=True)
    optimizer.zero_grad()
    for value, before in zip(task.model.buffers(), statistics, strict=True):
        value.copy_(before)


def _begin(task: Task, run: RunFolder, start: int) -> tuple[Writers, list[str]]:
    """Writes the run's config once nothing can be refused any more, and opens the trackers.

    Returns these, and what there is to say of images that are others than when the run began.
    """
    config, ranks = task.config, task.ranks
    opened = ranks.on_main(lambda: Writers.of(config.log_to, run.path, asdict(config), start))
    ranks.barrier()  # every rank has found all in order before one writes
    contents = contents_of(task.source) if ranks.main else {}
    before = (run.saved_options() or {}).get("contents", contents) if config.resume else contents
    if ranks.main:
        run.begin(config, task.outputs, **task.beside_config(), contents=before)
    ranks.barrier()
    return opened or Writers({}), other_contents(before, contents)


def _end(task: Task, checkpoints: Checkpoints, log: RunLog) -> None:
    """Exports the best weights, where the run looks for them, else the last; says what a range test has shown."""
    best, run = checkpoints.best, checkpoints.run.path
    if best.step not in (None, checkpoints.saved_step):
        log.say(checkpoints.go_back_to(best.step))
    task.export(run, log)
    if task.config.lr_range and task.ranks.main:
        text, draw = what_it_showed(run)
        log.say(text)
        log.draw(draw)


def _going_on(run: Path, checkpoint: Path | None, best: Best, last: bool) -> list[str]:
    """What there is to say of the checkpoint that a run goes on from. last: whether it is of the last step."""
    why = f", as {best.why()}" if best.ended else ""
    found = f"resumed from {checkpoint}" if checkpoint else "no checkpoint to resume from: starting at step 0"
    found += f", the run's last: only exporting again{why}" if last else ""
    return [*damaged_checkpoints(run), found, *best.notes]


def _loader(task: Task, schedule: Schedule, start: int) -> tuple[Loader, list[str]]:
    """The micro-batches of this rank's remaining steps, and what there is to say about the processes that load them."""
    config, ranks, steps = task.config, task.ranks, range(start, schedule.steps)
    sizes = (len(task.source), config.batch_size, steps, config.seed)
    order = micro_batches(*sizes, ranks.rank, ranks.world, schedule.micro_batch_size)
    dataset = task.dataset()
    batch_bytes = schedule.micro_batch_size * dataset.view.nbytes
    workers, notes = loader_processes(ranks.device, config.num_workers, batch_bytes)
    return make_loader(dataset, order, workers, pin_memory=ranks.device.type == "cuda"), notes
