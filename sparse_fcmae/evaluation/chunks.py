"""What a model makes of many images, in chunks on the disk until all of them are there.

A chunk is what it makes of so many samples in a row. Several processes share the chunks, and a call that was killed
leaves those that it has done, from which the next one goes on. Batches are the same in either case, and so are values.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_fcmae.data.batches import Batch, EvaluationImages, make_loader
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.evaluation.config import SeeingConfig
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json, write_atomic, write_json, writing
from sparse_fcmae.runtime.lock import lock_folder
from sparse_fcmae.weights.weights import Weights

SAMPLES = 512  # of a chunk, about
SETTINGS = "settings.json"
FORMAT = "sparse-fcmae {}"
# files in a folder of chunks
OWN = re.compile(r"(\d{8}\.npz|settings\.json|\.lock|\.(\d{8}\.npz|settings\.json)\.\d+\.tmp)$")
Arrays = dict[str, np.ndarray]  # by name, a row for each sample


class Chunks:
    """The chunks of a file `out`, in the folder beside it that is named as it with ".chunks" behind.

    samples: that are run, of which unreadable ones are left out of their chunk. settings: what decides on the values.
    """

    def __init__(self, out: Path, settings: dict[str, Any], samples: ImageSource, view: EvaluationView) -> None:
        self.folder, self.settings = out.with_name(f"{out.name}.chunks"), settings
        self.samples, self.view = samples, view
        self.each = max(1, round(SAMPLES / view.batch_size)) * view.batch_size
        self.count = -(-len(samples) // self.each)

    def begin(self, overwrite: bool = False) -> Any:
        """Makes the folder, or says that it goes on in it; returns what keeps other calls out of it until it is closed.

        overwrite: begin anew where the chunks there are of other settings, for which UserError is raised otherwise, and
        where nothing tells whether they are of the same images.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / SETTINGS
        if not file.exists() and (foreign := [path.name for path in self.folder.iterdir() if not OWN.match(path.name)]):
            raise UserError(f"{self.folder} holds {foreign[0]}, which is not of this command: move the folder away")
        lock = lock_folder(self.folder)
        before = read_json(file) if file.exists() else None
        if before != self.settings or (overwrite and doubt(self.settings)):
            if any(self.folder.glob("*.npz")) and not overwrite:
                lock.close()
                other = differing(before, self.settings)
                raise UserError(f"{self.folder} was begun with another {other}: give `overwrite=True` to begin anew")
            for chunk in self.folder.glob("*.npz"):
                chunk.unlink()
            write_json(file, self.settings)
        elif done := self.count - len(self._missing()):
            print(f"going on: {done} of {self.count} chunks are in {self.folder}{doubt(self.settings)}")
        return lock

    def make(self, function: Callable[[Tensor], dict[str, Tensor]], ranks: Ranks, description: str) -> None:
        """Has a function of normalised images [B, C, H, W] make the chunks that are not there, this rank's share.

        It returns tensors of B rows by name. description: the text of the progress bar.
        """
        missing = ranks.by_main(self._missing)
        own = missing[ranks.rank :: ranks.world]
        loader = make_loader(
            EvaluationImages(self.samples, self.view.of_image),
            [list(part) for number in own for part in self._batches(number)],
            self.view.num_workers,
            pin_memory=self.view.device.type == "cuda",
        )
        done = sum(len(self._range(number)) for number in range(self.count) if number not in missing)
        unit = "window" if self.view.native else "image"
        bar = tqdm(
            total=len(self.samples) if ranks.world == 1 else sum(len(self._range(number)) for number in own),
            initial=done if ranks.world == 1 else 0,
            desc=description,
            unit=unit,
            disable=not ranks.main,
            dynamic_ncols=True,
        )
        with bar, loader.explained(), self._said(ranks):
            loaded = iter(loader) if own else iter(())
            for number in own:
                kept, bad = [], []
                for _ in self._batches(number):
                    batch = next(loaded)
                    bad += batch.bad
                    if len(batch.pixels):
                        kept.append(self._run(function, batch))
                    bar.update(len(batch.pixels) + len(batch.bad))
                self._write(number, kept, bad)

    @contextmanager
    def _said(self, ranks: Ranks) -> Iterator[None]:
        """Says where an interruption leaves what was done."""
        try:
            yield
        except KeyboardInterrupt:
            if ranks.main:
                done = self.count - len(self._missing())
                print(f"interrupted: {done} of {self.count} chunks are in {self.folder}; the same command goes on")
            raise

    @torch.no_grad()
    def _run(self, function: Callable[[Tensor], dict[str, Tensor]], batch: Batch) -> Arrays:
        """What the function makes of a batch, with the numbers of its samples and the boxes of windows."""
        pixels = batch.pixels.to(self.view.device, non_blocking=True)
        normalised = self.view.form.normalise(pixels)
        with torch.autocast(self.view.device.type, torch.bfloat16, enabled=self.view.bf16):
            outputs = function(normalised)
        found = {name: value.float().cpu().numpy() for name, value in outputs.items()}
        found["sample"] = batch.index.numpy()
        if batch.boxes is not None:
            found["box"] = batch.boxes.numpy().astype(np.int32)
        return found

    def _write(self, number: int, kept: list[Arrays], bad: list[BadImage]) -> None:
        arrays = {name: np.concatenate([found[name] for found in kept]) for name in (kept[0] if kept else ())}
        arrays["bad"] = np.array(json.dumps(bad))
        write_atomic(self._file(number), lambda path: _save(path, arrays))

    def _missing(self) -> list[int]:
        """The numbers of the chunks that are not there, or not whole."""
        return [number for number in range(self.count) if not zipfile.is_zipfile(self._file(number))]

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npz"

    def _range(self, number: int) -> range:
        return range(number * self.each, min((number + 1) * self.each, len(self.samples)))

    def _batches(self, number: int) -> list[range]:
        samples, size = self._range(number), self.view.batch_size
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def of(self, *names: str) -> Iterator[Arrays]:
        """The arrays of these names, and `sample`, of one chunk after the other. A chunk without any has none."""
        for number in range(self.count):
            with np.load(self._file(number), allow_pickle=False) as arrays:
                if "sample" in arrays:
                    yield {name: arrays[name] for name in (*names, "sample")}

    def bad(self) -> list[BadImage]:
        """The unreadable samples of all chunks."""
        found = []
        for number in range(self.count):
            with np.load(self._file(number), allow_pickle=False) as arrays:
                found += [BadImage(*image) for image in json.loads(str(arrays["bad"]))]
        return found

    def remove(self) -> None:
        """Deletes what is this command's in the folder, and the folder unless something else is in it."""
        for file in self.folder.iterdir():
            if OWN.match(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _save(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:  # given a name, np.savez would add an extension
        np.savez(file, **arrays)


def settings_for(
    what: str, weights: Weights, view: EvaluationView, source: ImageSource, config: SeeingConfig
) -> dict[str, Any]:
    """What the values of chunks depend on, as JSON has it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.without("decoder").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    settings = {
        "format": FORMAT.format(what),
        "weights": digest.hexdigest(),
        "architecture": weights.architecture,
        "images": source.fingerprint,
        "version": source.version(),
        "normalised": weights.form.as_json(),
        "reading": asdict(view.reading),
        "size": view.size,
        "native": view.native,
        "crop_fraction": view.crop_fraction,
        "dtype": "bf16" if view.bf16 else "fp32",
        "backend": config.backend,
        "device": view.device.type,
        "batch_size": view.batch_size,
    }
    return json.loads(json.dumps(settings))


def doubt(settings: dict[str, Any]) -> str:
    """Words to add where values made with these settings are used again, on images that nothing tells the change of."""
    return "" if settings["version"] else "; whether images changed under the same names can't be told for this data"


def differing(before: dict[str, Any] | None, settings: dict[str, Any]) -> str:
    """What is another in settings that a file or folder has, in a word."""
    return next(
        (name.replace("_", " ") for name in settings if before and before.get(name) != settings[name]), "content"
    )
