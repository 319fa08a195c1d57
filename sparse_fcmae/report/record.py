"""What the folder of one run holds, as the values that its page shows."""

import io
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sparse_fcmae.evaluation.reconstruction import COLUMNS
from sparse_fcmae.evaluation.sheet import tiles_of
from sparse_fcmae.evaluation.verdict import OF_BLOCK, guessing, judge
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json
from sparse_fcmae.runtime.options import flag, image_size_of
from sparse_fcmae.runtime.rows import Rows, short
from sparse_fcmae.runtime.run_folder import CONFIG
from sparse_fcmae.training.log import LEFT_OUT, REPLACED
from sparse_fcmae.training.measures import is_detail, is_fraction
from sparse_fcmae.training.runs import Found, look_at

PICTURES = 24  # of reconstructions that a page shows
STAGES_STRIDE = 8  # of the downsampling behind the stem
LARGE, QUALITY = 300_000, 90  # bytes from which on a picture is made a JPEG, and of which quality
LINES, NAMED = 200, 1000  # of the log, and unreadable images, that a page shows
BESIDE = ("images", "contents", "classes", "problem_type")  # what a run's config.json has that is no option
CHARTS = {  # what metrics.jsonl measures: the heading, and by what the values are multiplied
    "lr": ("learning rate", 1),
    "grad_norm": ("norm of the gradient", 1),
    "images_per_second": ("images a second", 1),
    "data_wait": ("% of the time without an image to train on", 100),
    "memory_gb": ("memory, GB", 1),
}
TITLES = {
    "knn_top1": "k-NN top-1, %",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "miou": "mIoU, %",
    "r2": "R2",
    "effective_rank": "effective rank of the embeddings",
    "channel_distance": "distance between channels, in the block where it is least",
}
BY_NAME = ("by_class", "iou_by_class", "average_precision_by_label")  # what evaluation.json has of each output
TOLD = (float, int, str)
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Keep = Callable[[bytes, str], str]
Record = dict[str, Any]


class RunReader:
    """Reads what a run's page shows, again and again while the run goes on.

    keep: takes the bytes of a picture and their media type, and returns the address under which a page finds them.
    """

    def __init__(self, folder: Path, keep: Keep) -> None:
        self.folder, self.keep = folder, keep
        self.metrics, self.evaluations = Rows(folder / "metrics.jsonl"), Rows(folder / "evaluations.jsonl")
        self.kept: dict[Path, tuple[int, str]] = {}
        self.used: set[Path] = set()
        self._found()

    def keep_by(self, keep: Keep) -> None:
        """Has pictures be kept in another way from now on."""
        self.keep, self.kept = keep, {}

    def read(self) -> Record:
        """The run as it is now. Raises UserError where the folder holds no run."""
        found = self._found()
        config = read_json(self.folder / CONFIG)
        self.used.clear()
        self.metrics.read_on()
        self.evaluations.read_on()
        log = self._log()
        pictures, unfit = self._reconstructions(config)
        record = {
            "folder": str(self.folder),
            "task": found.task,
            "state": found.state,
            "verdict": self._verdict(found, config),
            "facts": self._facts(found, config),
            "notes": [*self._notes(), *unfit],
            "charts": self._charts(found.task, config),
            "reconstructions": pictures,
            "evaluation": self._evaluation(),
            "analysis": self._analysis(),
            "exported": self._exported(),
            "options": {flag(name): value for name, value in config.items() if name not in ("format", *BESIDE)},
            "images": config.get("images"),
            "classes": config.get("classes"),
            "unreadable": unreadable_in(log),
            "log": log[-LINES:],
        }
        self.kept = {path: kept for path, kept in self.kept.items() if path in self.used}
        return record

    def _found(self) -> Found:
        """How far the run is. Raises UserError where there is none."""
        if found := look_at(self.folder):
            return found
        raise UserError(f"{self.folder}: no run in this folder")

    def _verdict(self, found: Found, config: dict[str, Any]) -> dict[str, str] | None:
        """Whether a pretraining run goes well, None where there is nothing to judge."""
        epoch, step = self.metrics.last("epoch"), self.metrics.last("step")
        if found.task != "pretraining" or config.get("lr_range") or not (found.steps and epoch):
            return None
        warmup = round((config.get("warmup_epochs") or 0) * step / epoch)
        told = (config.get("norm_pix_loss", True), bool(config.get("init")))
        return judge(self.metrics, self.evaluations, warmup, found.steps, *told)._asdict()

    def _facts(self, found: Found, config: dict[str, Any]) -> list[tuple[str, str]]:
        """What one looks for first: names and values in words."""
        row, facts = self.metrics.last, [("state", found.state)]
        facts.append(("step", f"{found.step:,} of {found.steps:,}" if found.steps else f"{found.step:,}"))
        if epoch := row("epoch"):
            whole = config.get("epochs") if not config.get("max_steps") else None
            facts.append(("epoch", f"{epoch:.4g} of {whole}" if whole else f"{epoch:.4g}"))
        if (loss := row("loss")) is not None:
            facts.append(("loss", f"{loss:.4f}"))
        for name in self._measured():
            if (value := self.evaluations.last(name)) is not None:
                facts.append((in_words("val_loss" if name == "loss" else name), told(name, value)))
        if speed := row("images_per_second"):
            facts.append(("images a second", f"{speed:.0f}"))
            if found.state == "running" and found.steps:
                left = (found.steps - found.step) * config["batch_size"] / speed
                facts.append(("time left", in_hours(left)))
        if (memory := row("memory_gb")) is not None:
            facts.append(("memory", f"{memory:.1f} GB"))
        for name, shown in (("unreadable", "unreadable images"), ("nonfinite", "steps skipped, as not finite")):
            if count := row(name):
                facts.append((shown, f"{count:.0f}"))
        written = time.time() - found.seconds
        return [*facts, ("last written", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written)))]

    def _measured(self) -> list[str]:
        """The names of what evaluations measure, without those of which there are many."""
        return [name for name in self.evaluations.columns if name not in ("step", "epoch") and not is_detail(name)]

    def _notes(self) -> list[str]:
        """What is wrong with the files."""
        files = [rows for rows in (self.metrics, self.evaluations) if rows.damaged]
        return [f"{rows.path.name} has lines that are no rows and are left out: {rows.damaged}" for rows in files]

    def _charts(self, task: str, config: dict[str, Any]) -> list[Record]:
        """Headings, and lines over the steps. The loss is there twice where it is measured on held-out images too."""
        held_out = "val_loss" if task == "pretraining" else "loss"
        lines = [line("steps", self.metrics.curve("loss"))]
        for prefix, label in (("", "held-out images"), ("ema_", "held-out images, moving average")):
            lines.append(line(label, self.evaluations.curve(prefix + held_out), dashed=bool(prefix)))
        charts = [chart("loss", "loss on hidden patches" if task == "pretraining" else "loss", lines)]
        if task == "pretraining" and not config.get("init"):
            nothing = guessing(self.metrics.numbers("loss"), config.get("norm_pix_loss", True))
            charts[0]["mark"] = {"value": short(nothing), "text": "nothing learnt"}
        for name in self._measured():
            if name == held_out or name.startswith("ema_"):
                continue
            scale = 100 if is_fraction(name) else 1
            title = TITLES.get(name, in_words(name) + (", %" if is_fraction(name) else ""))
            lines = [
                line(label, self.evaluations.curve(prefix + name, scale), dashed=bool(prefix))
                for prefix, label in (("", ""), ("ema_", "moving average"))
            ]
            charts.append(chart(name, title, lines))
        blocks = {name: name.removeprefix(OF_BLOCK) for name in self.evaluations.columns if name.startswith(OF_BLOCK)}
        lines = [line(f"block {block}", self.evaluations.curve(name)) for name, block in sorted(blocks.items())]
        charts.append(chart("distances", "distance between channels, block by block", lines) | {"detail": True})
        for name, (title, scale) in CHARTS.items():
            charts.append(chart(name, title, [line("", self.metrics.curve(name, scale))]))
        return [found for found in charts if found["lines"]]

    def _reconstructions(self, config: dict[str, Any]) -> tuple[Record | None, list[str]]:
        """Sheets by step, the first, the newest and others evenly spread, and where the tiles lie on each.

        Returns with it what there is to say of sheets that are not laid out as the newest, or can't be cut up.
        """
        paths = sorted((self.folder / "reconstructions").glob("step-*.png"))
        if not paths:
            return None, []
        size, of = size_of(paths[-1]), len(paths)
        alike = [path for path in paths if size_of(path) == size]
        tiles = tiles_of(size, len(COLUMNS), image_size_of(config["image_size"]))
        shown = alike if tiles else []
        others = f"{of - len(shown)} of {of} pictures of reconstructions have another layout, and are not shown"
        notes = [others] if len(shown) < of else []
        if not shown:
            return None, notes
        chosen = {round(number * (len(shown) - 1) / (PICTURES - 1)) for number in range(PICTURES)}
        sheets = [(int(shown[n].stem.removeprefix("step-")), self._picture(shown[n])) for n in sorted(chosen)]
        steps = [{"step": step, "source": source} for step, source in sheets]
        patch = STAGES_STRIDE * config.get("stem_stride", 4)
        grid = [side // patch for side in image_size_of(config["image_size"])]
        return {"columns": COLUMNS, "tiles": tiles, "steps": steps, "of": len(shown), "grid": grid}, notes

    def _evaluation(self) -> Record | None:
        """What `evaluate` wrote into the folder "evaluation" of the run."""
        folder = self.folder / "evaluation"
        if not (folder / "evaluation.json").is_file():
            return None
        found, confusion = read_json(folder / "evaluation.json"), folder / "confusion.json"
        return {
            "facts": [(in_words(name), told(name, value)) for name, value in found.items() if isinstance(value, TOLD)],
            "tables": {in_words(name): value for name, value in found.items() if name in BY_NAME},
            "confusion": sparse_counts(read_json(confusion)) if confusion.is_file() else None,
            "pictures": self._pictures(folder, ["mistakes.png"]),
        }

    def _analysis(self) -> Record | None:
        """What `analyze` wrote into the folder "analysis" of the run."""
        folder = self.folder / "analysis"
        if not (folder / "analysis.json").is_file():
            return None
        names = ["collapse.png", "spectrum.png", *sorted(path.name for path in folder.glob("channels-*.png"))]
        encoders = [
            {k: v for k, v in found.items() if k != "singular_values"} for found in read_json(folder / "analysis.json")
        ]
        return {"encoders": encoders, "pictures": self._pictures(folder, names)}

    def _exported(self) -> list[Record]:
        """The folders of exported weights: what lies in them, and how they are loaded."""
        folders = [self.folder / name for name in ("exported", "exported-ema")]
        return [exported(folder) for folder in folders if (folder / CONFIG).is_file()]

    def _log(self) -> list[str]:
        path = self.folder / "train.log"
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []

    def _pictures(self, folder: Path, names: Iterable[str]) -> list[Record]:
        paths = [folder / name for name in names]
        return [{"name": path.stem, "source": self._picture(path)} for path in paths if path.is_file()]

    def _picture(self, path: Path) -> str:
        """Where a page finds a picture. It is read again only where it has been written again."""
        self.used.add(path)
        written = path.stat().st_mtime_ns
        if self.kept.get(path, (None, ""))[0] != written:
            self.kept[path] = written, self.keep(*compressed(path))
        return self.kept[path][1]


def line(label: str, curve: dict[str, Any] | None, dashed: bool = False) -> Record | None:
    """A line of a chart, None where nothing was measured."""
    return {"label": label, "dashed": dashed, **curve} if curve else None


def chart(name: str, title: str, lines: list[Record | None]) -> Record:
    """A chart of the lines that there are."""
    return {"name": name, "title": title, "lines": [found for found in lines if found]}


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture. Raises UserError where it is none."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture: delete it") from None


def compressed(path: Path) -> tuple[bytes, str]:
    """A PNG's bytes and media type, or those of a JPEG of it, if it is large and the JPEG is smaller."""
    data = path.read_bytes()
    if len(data) < LARGE:
        return data, "image/png"
    packed = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.convert("RGB").save(packed, format="JPEG", quality=QUALITY, subsampling=0)
    return (packed.getvalue(), "image/jpeg") if packed.tell() < len(data) else (data, "image/png")


def sparse_counts(confusion: dict[str, Any]) -> dict[str, Any]:
    """A confusion matrix as [true, predicted, count] of the pairs that occur, as of 1000 classes few do."""
    counts = [[t, p, n] for t, row in enumerate(confusion["counts"]) for p, n in enumerate(row) if n]
    return {"classes": confusion["classes"], "counts": counts}


def exported(folder: Path) -> Record:
    """What lies in a folder of exported weights, and the code of its model card that loads them."""
    card = folder / "README.md"
    code = SNIPPET.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    files = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file()]
    return {"folder": str(folder), "files": files, "code": code[1].replace("FOLDER", str(folder)) if code else None}


def unreadable_in(log: list[str]) -> Record:
    """The images that a log says could not be read, each once, with the reason."""
    found = {}
    for text in log:
        for phrase in (REPLACED, LEFT_OUT):
            _, there, rest = text.partition(phrase)
            if there:
                name, _, reason = rest.partition(": ")
                found.setdefault(name, reason)
    return {"count": len(found), "named": list(found.items())[:NAMED]}


def in_words(name: str) -> str:
    """The name of a value as people say it."""
    name = name.replace("knn", "k-NN").replace("miou", "mIoU").replace("val_", "held-out ")
    return name.replace("ema_", "moving average ").replace("_", " ").replace("top", "top-")


def told(name: str, value: float | int | str) -> str:
    """A value of an evaluation as people say it."""
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if is_fraction(name) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def in_hours(seconds: float) -> str:
    """Seconds as hours and minutes, or minutes alone."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def as_json(value: Any) -> str:
    """JSON in which no tag can begin, so that it may stand within a page."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
