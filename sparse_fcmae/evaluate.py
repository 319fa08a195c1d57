"""How good a model is on labelled images: accuracy of a classifier, k-NN and linear probe of an encoder."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_fcmae import visualize
from sparse_fcmae.config import EvaluateConfig, flag, image_size_of
from sparse_fcmae.data import BadImage, crop_share
from sparse_fcmae.encoder import SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import write_atomic, write_json, writing
from sparse_fcmae.formats.weights import Weights, read_weights
from sparse_fcmae.labelled import HELD_OUT, ClassFolder, open_splits, outputs_of, wordnet_ids
from sparse_fcmae.probes import Viewing, features_of, linear_probe, nearest_neighbours, run_over
from sparse_fcmae.training import distributed
from sparse_fcmae.training.configure import check_values

EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # ImageNet-C's further ones, not in mCE
EVALUATION, CONFUSION, PICTURE = "evaluation.json", "confusion.json", "confusion.png"
ALEXNET = {  # its error rates on ImageNet-C, which mCE is relative to (Hendrycks and Dietterich, 2019, section 4)
    **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880},
    **{"glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572},
    **{"fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056},
    **{"pixelate": 0.717840, "jpeg_compression": 0.606500},
}


def evaluate(**options: Any) -> dict[str, Any]:
    """Evaluates a classifier, or with `knn` or `linear_probe` an encoder; options are those of `EvaluateConfig`.

    Returns what was measured, shares between 0 and 1. Raises UserError for what the user can put right.
    """
    known = {f.name for f in fields(EvaluateConfig)}
    for name in options.keys() - known:
        raise TypeError(f"evaluate() got an unexpected option {name!r}")
    config = EvaluateConfig(**{k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()})
    _check(config)
    weights = read_weights(config.init).per_image()
    weights.check_usable(config.init)
    device = distributed.choose_device(config.device)
    size = image_size_of(config.image_size or weights.architecture["image_size"])
    with torch.device("meta"):
        SparseEncoder(**weights.architecture).grid(*size)
    view = Viewing(
        size,
        weights.architecture["in_chans"],
        config.crop_share or crop_share(size),
        device,
        distributed.choose_dtype(config.dtype, device, config.backend) == torch.bfloat16,
        config.batch_size,
        distributed.cores_per_rank() if config.num_workers is None else config.num_workers,
    )
    out = Path(config.out) if config.out else None
    if out:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    if config.knn or config.linear_probe:
        measured = _probe(config, weights, view)
    elif not weights.num_classes:
        raise UserError(
            f"{config.init} has no classification head: give --knn or --linear-probe, or fine-tune it first"
        )
    elif corruptions := corruption_folders(Path(config.data)):
        measured = _corrupted(config, weights, view, corruptions)
    else:
        measured = _classify(config, weights, view)
    found = {"weights": config.init, **measured}
    print(report(found))
    confusion = found.pop("confusion", None)
    if out:
        write_json(out / EVALUATION, found)
        with writing(out):  # what an earlier evaluation left
            (out / CONFUSION).unlink(missing_ok=True)
            (out / PICTURE).unlink(missing_ok=True)
        if confusion is not None:
            _write_confusion(out, confusion)
    return found | ({"confusion": confusion} if confusion is not None else {})


def _check(config: EvaluateConfig) -> None:
    """Raises UserError for options that can't be; touches nothing on the disk."""
    for name in ("data", "init"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing: name {'the images' if name == 'data' else 'the weights'}")
    check_values(config, ("batch_size", "neighbours", "crop_share", "labels_per_class"), ("seed", "num_workers"))
    if config.crop_share and config.crop_share > 1:
        raise UserError(f"--crop-share {config.crop_share} must be at most 1")
    for name in ("val_split", "labels_per_class"):
        if getattr(config, name) is not None and not (config.knn or config.linear_probe):
            raise UserError(f"{flag(name)} goes with --knn or --linear-probe alone")
    out = Path(config.out or ".")
    if config.out and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose another")
    if config.out and (out / EVALUATION).exists() and not config.overwrite:
        raise UserError(f"--out {out} holds an evaluation: choose another or give --overwrite")


def accuracy(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """top1, top5, top-1 by class and the confusion matrix of logits [N, K] of K classes, given labels int64 [N]."""
    ranked = logits.topk(min(5, len(classes)), dim=1).indices
    right = ranked == labels[:, None]
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels, ranked[:, 0]), torch.ones_like(labels), accumulate=True)
    by_class = counts.diagonal() / counts.sum(1)
    return {
        "images": len(labels),
        "top1": right[:, 0].float().mean().item(),
        "top5": right.any(1).float().mean().item(),
        "by_class": {name: share for name, share in zip(classes, by_class.tolist(), strict=True) if share == share},
        "confusion": {"classes": list(classes), "counts": counts.tolist()},
    }


def corruption_folders(root: Path) -> dict[str, list[Path]]:
    """The folders CORRUPTION/SEVERITY of ImageNet-C's layout, by corruption, one or two levels below `root`."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder")
    above = [p for p in sorted(root.iterdir()) if p.is_dir()]
    above += [q for p in above for q in sorted(p.iterdir()) if q.is_dir()]
    folders = {folder.name: sorted(folder.glob("[1-5]")) for folder in above if folder.name in (*ALEXNET, *EXTRA)}
    return {name: severities for name, severities in folders.items() if severities}


def _held_out(root: Path) -> ClassFolder:
    """The images to evaluate on: those of val or test, or of the folder itself."""
    held = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    if held is None and (root / "train").is_dir():
        raise UserError(f"--data {root} has no folder {' or '.join(HELD_OUT)}: name a folder of classes")
    return ClassFolder(held or root)


def _classify(config: EvaluateConfig, weights: Weights, view: Viewing) -> dict[str, Any]:
    folder = _held_out(Path(config.data))
    model = weights.classifier(config.backend).to(view.device)
    found, bad = _accuracy_on(folder, model, weights, view, "evaluating")
    return {"data": str(folder.root), "unreadable": [b.file for b in bad], **found}


def _accuracy_on(
    folder: ClassFolder, model: nn.Module, weights: Weights, view: Viewing, what: str
) -> tuple[dict[str, Any], list[BadImage]]:
    """Accuracy among all outputs; but for folders of some WordNet ids, as ImageNet-A's and -R's, among these alone."""
    outputs = outputs_of(folder, weights.num_classes, weights.classes)
    logits, index, bad = run_over(folder, model, view, what)
    labels = folder.labels[index]
    subset = len(outputs) < weights.num_classes == 1000 and set(folder.classes) <= set(wordnet_ids())
    if subset:
        found = accuracy(logits[:, outputs], labels, folder.classes)
    else:
        names = list(weights.classes or map(str, range(weights.num_classes)))
        for output, name in zip(outputs.tolist(), folder.classes, strict=True):
            names[output] = name
        found = accuracy(logits, outputs[labels], tuple(names))
    return {"outputs": weights.num_classes, "among": len(outputs) if subset else weights.num_classes, **found}, bad


def _corrupted(
    config: EvaluateConfig, weights: Weights, view: Viewing, corruptions: dict[str, list[Path]]
) -> dict[str, Any]:
    """Error by corruption and severity; their mean; and mCE where all of ImageNet-C's are there."""
    if config.crop_share is None:  # these images are cropped already
        view = replace(view, share=1.0)
    model = weights.classifier(config.backend).to(view.device)
    errors: dict[str, dict[str, float]] = {}
    images, bad = 0, []
    for name, severities in corruptions.items():
        errors[name] = {}
        for folder in severities:
            found, unreadable = _accuracy_on(ClassFolder(folder), model, weights, view, f"{name} {folder.name}")
            errors[name][folder.name] = 1 - found["top1"]
            images, bad = images + found["images"], bad + unreadable
    means = {name: sum(values.values()) / len(values) for name, values in errors.items()}
    result = {
        **{"data": config.data, "images": images, "unreadable": [b.file for b in bad]},
        **{"errors": errors, "mean_error": sum(means.values()) / len(means)},
    }
    if weights.num_classes == 1000 and set(ALEXNET) <= set(means) and all(len(errors[name]) == 5 for name in ALEXNET):
        result["mCE"] = sum(means[name] / ALEXNET[name] for name in ALEXNET) / len(ALEXNET)
    return result


def _probe(config: EvaluateConfig, weights: Weights, view: Viewing) -> dict[str, Any]:
    train, held = open_splits(config.data, config.val_split, config.seed)
    if config.labels_per_class:
        train = train.few(config.labels_per_class, config.seed)
    encoder = weights.encoder(config.backend).to(view.device)
    features, labels, bad = features_of(train, encoder, view, "training images")
    queries, truth, more = features_of(held, encoder, view, "held-out images")
    result = {"data": config.data, "train_images": len(labels), "images": len(truth)}
    result["unreadable"] = [entry.file for entry in bad + more]
    if config.knn:
        predicted = nearest_neighbours(features, labels, queries, config.neighbours)
        result["knn_top1"] = (predicted == truth).float().mean().item()
    if config.linear_probe:
        result["linear_probe_top1"] = (linear_probe(features, labels, queries) == truth).float().mean().item()
    return result


def report(found: dict[str, Any]) -> str:
    """What `evaluate` measured, for people: a line each."""
    lines = [f"{found['images']} images of {found['data']}"]
    if found.get("unreadable"):
        lines.append(f"{len(found['unreadable'])} more are unreadable, such as {found['unreadable'][0]}")
    for name in ("top1", "top5", "knn_top1", "linear_probe_top1"):
        if name in found:
            lines.append(f"{name.replace('_', ' ').replace('top', 'top-')} {100 * found[name]:.2f} %")
    if found.get("among", 0) < found.get("outputs", 0):
        lines.append(f"among the {found['among']} of {found['outputs']} classes that the folder has")
    if "by_class" in found:
        ordered = sorted(found["by_class"].items(), key=lambda item: item[1])[:20]
        lines.append(
            "by class, the worst first: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in ordered)
        )
    for name, errors in found.get("errors", {}).items():
        lines.append(f"{name:20} error " + "  ".join(f"{100 * error:5.1f}" for error in errors.values()) + " %")
    if "mean_error" in found:
        lines.append(f"mean error {100 * found['mean_error']:.2f} %")
    if "mCE" in found:
        lines.append(f"mCE {100 * found['mCE']:.2f} %")
    return "\n".join(lines)


def _write_confusion(out: Path, confusion: dict[str, Any]) -> None:
    write_atomic(out / CONFUSION, lambda p: p.write_text(json.dumps(confusion) + "\n"))
    try:
        visualize.draw_confusion(confusion, out / PICTURE)
    except ImportError:
        print(f"{PICTURE} is not drawn, as matplotlib is not installed (extra: plots)")
