"""The command `reconstruct`: pictures of what a pretrained model fills in, of any images and under any mask."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.evaluation.config import ReconstructConfig
from sparse_fcmae.evaluation.reconstruction import Reconstruction, draw_reconstruction, reconstruct
from sparse_fcmae.evaluation.run import EvaluationView, check_any, view_of
from sparse_fcmae.evaluation.samples import Samples, check_apart, check_ending, say_unreadable, spread_batches
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.runtime.checkpoint_folder import checkpoints_in, damage, step_of
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import check_writable, one_line, write_atomic, writing
from sparse_fcmae.runtime.options import check, check_given, check_paths, keywords_of, listed
from sparse_fcmae.weights.read import read_weights

ENDINGS = (".png", ".gif", ".webp")
ANIMATED = ENDINGS[1:]  # with a frame for each checkpoint
MOST_PIXELS = {".webp": 16383, ".gif": 65535}  # along a side
FRAME, LAST_FRAME = 600, 3000  # milliseconds


@keywords_of(ReconstructConfig)
def draw_reconstructions(options: dict[str, Any]) -> Path:
    """Draws what a pretrained model fits into hidden patches, and returns the picture's path.

    Raises UserError for what the user can put right.
    """
    config, checkpoints = checked(options)
    out = Path(config.out)
    weights = read_weights(checkpoints[-1], whole=True)
    view = view_of(config, weights)
    samples = Samples(config.data, view, config)
    print("\n".join([*weights.notes, *samples.notes]), flush=True)
    pixels, names, bad = views_of(samples, view, config.images)
    if config.masks > 1:
        pixels = pixels.repeat_interleave(config.masks, 0)
        names = [f"{name}, mask {number + 1}" for name in names for number in range(config.masks)]
    mask, channels, frames = None, shown_channels(config, view.form.in_chans), []
    for checkpoint in tqdm(checkpoints, desc="checkpoints", delay=2, leave=False, dynamic_ncols=True):
        model = read_weights(checkpoint, whole=True).fcmae(config.backend).to(view.device)
        mask = masks_for(model, config, view.size, len(pixels)) if mask is None else mask
        found = in_batches(model, view, pixels, mask)
        step = f", step {step_of(checkpoint)}" if len(checkpoints) > 1 else ""
        frames.append(draw_reconstruction(found, view.form, names, channels, step))
        check_size(frames[0], out)
    write_atomic(out, lambda path: save(frames, path, out.suffix))
    print(f"{out}: {len(pixels)} rows; the loss on what is hidden is {found.loss:.4f}")
    say_unreadable(bad, out)
    return out


def checked(options: dict[str, Any]) -> tuple[ReconstructConfig, list[Path]]:
    """The config of options, and the weights to show, the oldest first. Raises UserError for options that can't be."""
    check_paths(ReconstructConfig, options)
    check_given(options, {"data": "the images", "init": "a run of `pretrain`", "out": "the picture"})
    config = ReconstructConfig(**options)
    check(config)
    out = Path(config.out)
    check_ending("out", out, ENDINGS)
    if out.exists() and not config.overwrite:
        raise UserError(f"`out` {out} exists: choose another or give `overwrite=True`")
    check_apart(config.data, out)
    if config.mask and (config.mask_ratio is not None or config.masks > 1):
        raise UserError("`mask` is one mask: leave `mask_ratio` and `masks` out")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    if out.suffix not in ANIMATED:
        return config, [Path(config.init)]
    whole = [folder for folder in reversed(checkpoints_in(Path(config.init))) if damage(folder) is None]
    if len(whole) < 2:
        raise UserError(
            f"`init` {config.init} has {len(whole)} checkpoints, too few for an animation: give `out` ending in .png, "
            "or keep more in another run, by `keep_every`"
        )
    return config, whole


def views_of(samples: Samples, view: EvaluationView, count: int) -> tuple[Tensor, list[str], list[BadImage]]:
    """Up to `count` samples spread evenly: pixels [N, H, W, C] as they are read, names, and what is unreadable."""
    pixels, names, bad = [], [], list(samples.left_out)
    for batch, readable in spread_batches(samples, view, count):
        names += readable
        pixels += [batch.pixels] if readable else []
        bad += batch.bad
    check_any(names, bad, samples.source)
    return torch.cat(pixels), names, bad


def in_batches(model: FCMAE, view: EvaluationView, pixels: Tensor, mask: Tensor) -> Reconstruction:
    """What `reconstruct` gives of rows of any number, on the CPU."""
    found = []
    for part, hidden in zip(pixels.split(view.batch_size), mask.split(view.batch_size), strict=True):
        with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
            found.append(reconstruct(model, view.form, part.to(view.device), hidden))
    patches = [int(hidden.sum()) for hidden in mask.split(view.batch_size)]
    loss = sum(part.loss.cpu() * count for part, count in zip(found, patches, strict=True)) / sum(patches)
    images, predicted, hidden = (torch.cat([part[i].cpu() for part in found]) for i in range(3))
    return Reconstruction(images, predicted, hidden, loss)


def shown_channels(config: ReconstructConfig, in_chans: int) -> list[int]:
    """The channels to show, counted from 0; none for what suits their number."""
    if config.show is None:
        return []
    channels = listed("show", config.show, int)
    if len(channels) > 3 or not all(1 <= channel <= in_chans for channel in channels):
        raise UserError(f"`show` {config.show}: name one, two or three of the {in_chans} channels, counted from 1")
    return [channel - 1 for channel in channels]


def masks_for(model: FCMAE, config: ReconstructConfig, size: tuple[int, int], count: int) -> Tensor:
    """A mask for each row, bool [N, H/P, W/P]: the one that is given, or drawn from the seed."""
    if config.mask:
        return mask_in(Path(config.mask), model.encoder.grid(*size)).expand(count, -1, -1)
    if config.mask_ratio is not None:
        model.mask_ratio = config.mask_ratio
    return model.draw_mask(count, size, generator=torch.Generator().manual_seed(config.seed))


def mask_in(file: Path, grid: tuple[int, int]) -> Tensor:
    """The mask that a picture shows, brought to a grid of patches, bool [1, rows, cols]: what is bright is hidden."""
    try:
        with Image.open(file) as picture:
            small = picture.convert("L").resize(grid[::-1], Image.Resampling.BOX)
    except OSError as error:
        raise UserError(f"`mask` {file} can't be read: {one_line(error)}") from None
    mask = torch.from_numpy(np.asarray(small) > 127)[None]
    if mask.all() or not mask.any():
        what = "hides all patches" if mask.all() else "hides no patch"
        raise UserError(f"`mask` {file} {what}: paint what is to be hidden white, and the rest black")
    return mask


def check_size(frame: Image.Image, out: Path) -> None:
    """Raises UserError for a picture that the file's format has no room for."""
    most = MOST_PIXELS.get(out.suffix, max(frame.size))
    if max(frame.size) > most:
        raise UserError(
            f"`out` {out}: the picture has {frame.height} rows of pixels, and {out.suffix} at most {most}: give `out` "
            "ending in .png, or fewer `images` or `masks`"
        )


def save(frames: list[Image.Image], path: Path, ending: str) -> None:
    """Writes a picture, or several as an animation without end that rests on the last one."""
    if ending not in ANIMATED:
        frames[0].save(path, format="PNG")
        return
    durations = [*[FRAME] * (len(frames) - 1), LAST_FRAME]
    frames[0].save(path, ending[1:].upper(), save_all=True, append_images=frames[1:], duration=durations, loop=0)
