"""The command `evaluate`: accuracy of a classifier on labelled images, or of probes on an encoder's features."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from sparse_fcmae.data.config import MASK_OPTIONS
from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.data.sources.class_folder import open_held_out, open_splits
from sparse_fcmae.data.sources.corruptions import find_corruptions
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.pages import labelled_by_page
from sparse_fcmae.data.splits import few_labels
from sparse_fcmae.evaluation.accuracy import TOP, accuracy
from sparse_fcmae.evaluation.answer_tables import TABLES, rows_of, write_table
from sparse_fcmae.evaluation.config import EvaluateConfig
from sparse_fcmae.evaluation.imagenet import CORRUPTIONS, mean_corruption_error, outputs_of, wordnet_ids
from sparse_fcmae.evaluation.mistakes import Answers, draw_mistakes
from sparse_fcmae.evaluation.plots import draw_confusion
from sparse_fcmae.evaluation.probes import features_of, linear_probe, nearest_neighbours
from sparse_fcmae.evaluation.problems import PROBLEMS
from sparse_fcmae.evaluation.run import EvaluationSet, EvaluationView, check_any, run_model, view_of
from sparse_fcmae.evaluation.samples import check_ending, warn_of_another_split
from sparse_fcmae.evaluation.segmentation import evaluate_segmenter
from sparse_fcmae.evaluation.sheet import save_picture
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import check_writable, write_atomic, write_json, writing
from sparse_fcmae.runtime.options import check, check_given, check_paths, check_unused, keywords_of
from sparse_fcmae.weights.read import Weights, read_weights
from sparse_fcmae.weights.segmenter import holds_segmenter

# files in the folder `out`
EVALUATION, CONFUSION, PICTURE, MISTAKES = "evaluation.json", "confusion.json", "confusion.png", "mistakes.png"


@keywords_of(EvaluateConfig)
def evaluate(options: dict[str, Any]) -> dict[str, Any]:
    """Evaluates a classifier or a segmentation model, or with `knn` or `linear_probe` an encoder, and prints a report.

    Returns what was measured, as fractions between 0 and 1. Raises UserError for what the user can put right.
    """
    config = checked(options)
    if holds_segmenter(config.init) and not (config.knn or config.linear_probe):
        measure = partial(evaluate_segmenter, config)
    else:
        check_unused(config, MASK_OPTIONS, "is for a segmentation model: leave it out")
        weights = read_weights(config.init).per_image()
        if config.per_image and weights.task != "classification":
            raise UserError("`per_image` is of one class an image: `predict` writes what this model says of each")
        for note in weights.notes:
            print(note)
        measure = partial(measured, config, weights, view_of(config, weights))
    out = Path(config.out) if config.out else None
    if out:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    found = {"weights": config.init, **measure()}
    mistakes = found.pop("mistakes", None)
    print(report(found))
    if out:
        save(found, mistakes, out)
    return found


def checked(options: dict[str, Any]) -> EvaluateConfig:
    """The config of options. Raises UserError for options that can't be; touches nothing on the disk."""
    check_paths(EvaluateConfig, options)
    check_given(options, {"data": "the images", "init": "the weights"})
    config = EvaluateConfig(**options)
    check(config)
    if config.labels_per_class is not None and not (config.knn or config.linear_probe):
        raise UserError("`labels_per_class` goes with `knn` or `linear_probe` alone")
    if config.per_image:
        check_ending("per_image", Path(config.per_image), TABLES)
        check_writable(Path(config.per_image))
        if config.knn or config.linear_probe:
            raise UserError("`per_image` is of a classifier: leave out `knn` and `linear_probe`")
        if Path(config.per_image).exists() and not config.overwrite:
            raise UserError(f"`per_image` {config.per_image} exists: choose another or give `overwrite=True`")
    if config.out:
        out = Path(config.out)
        if out.exists() and not out.is_dir():
            raise UserError(f"`out` {out} is a file: choose another")
        if (out / EVALUATION).exists() and not config.overwrite:
            raise UserError(f"`out` {out} holds an evaluation: choose another or give `overwrite=True`")
    return config


def measured(config: EvaluateConfig, weights: Weights, view: EvaluationView) -> dict[str, Any]:
    """What the options ask for, of the images that `data` holds."""
    if config.knn or config.linear_probe:
        return probe(config, weights, view)
    if not weights.num_classes:
        raise UserError(
            f"{config.init} has no classification head: give `knn=True` or `linear_probe=True`, or fine-tune it first"
        )
    if weights.task != "classification":
        return judge(config, weights, view)
    if (
        config.val_split is None
        and os.path.isdir(config.data)
        and (corruptions := find_corruptions(config.data, CORRUPTIONS))
    ):
        if config.per_image:
            raise UserError("`per_image` is of one set of images: name one severity of one corruption as `data`")
        return classify_corrupted(config, weights, view, corruptions)
    return classify(config, weights, view)


def probe(config: EvaluateConfig, weights: Weights, view: EvaluationView) -> dict[str, Any]:
    """Accuracy of nearest neighbours and of a linear probe on the encoder's features of held-out images."""
    train, held_out = open_splits(config.data, config.val_split, config.seed, config=config)
    if config.labels_per_class:
        train = few_labels(train, config.labels_per_class, config.seed)
    train, held_out = (labelled_by_page(part, view.reading) for part in (train, held_out))
    held_out.notes = [note for note in held_out.notes if note not in train.notes]  # which are printed for both
    encoder = weights.encoder(config.backend).to(view.device)
    features, labels, bad = features_of(EvaluationSet(train, view), encoder, "training images")
    check_any(labels, bad, train)
    queries, truth, bad_queries = features_of(EvaluationSet(held_out, view), encoder, "held-out images")
    check_any(truth, bad_queries, held_out)
    found = {
        "data": config.data,
        "train_images": len(labels),
        "images": len(truth),
        "unreadable": [image.name for image in bad + bad_queries],
    }
    if config.knn:
        predicted = nearest_neighbours(features, labels, queries, config.neighbours)
        found["knn_top1"] = (predicted == truth).float().mean().item()
    if config.linear_probe:
        predicted = linear_probe(features, labels, queries)
        found["linear_probe_top1"] = (predicted == truth).float().mean().item()
    return found


def judge(config: EvaluateConfig, weights: Weights, view: EvaluationView) -> dict[str, Any]:
    """What is measured of a model of several labels or of a number, on the images that `classify` takes."""
    source, split = held_out_images(config, of_classes=False)
    problem, outputs = PROBLEMS[weights.task], weights.classes or tuple(map(str, range(weights.num_classes)))
    source = labelled_by_page(source, view.reading)
    targets = problem.targets(source, outputs)
    model = weights.classifier(config.backend).to(view.device)
    values, index, bad = run_model(EvaluationSet(source, view), model, "evaluating")
    check_any(index, bad, source)
    found = problem.scores(values, targets[index])
    return {
        "data": str(source),
        **split,
        "images": len(index),
        "unreadable": [image.name for image in bad],
        **{name: found[name] for name in problem.measures if name != "loss"},
        **problem.by_output(values, targets[index], outputs),
    }


def classify(config: EvaluateConfig, weights: Weights, view: EvaluationView) -> dict[str, Any]:
    """Accuracy of the classifier on the images that are held out, or on all where none are."""
    source, split = held_out_images(config)
    model = weights.classifier(config.backend).to(view.device)
    source = labelled_by_page(source, view.reading)
    per_image = Path(config.per_image) if config.per_image else None
    found, bad = accuracy_on(source, model, weights, view, "evaluating", per_image, mistakes=bool(config.out))
    return {"data": str(source), **split, "unreadable": [image.name for image in bad], **found}


def held_out_images(config: EvaluateConfig, of_classes: bool = True) -> tuple[Labelled, dict[str, Any]]:
    """The images to evaluate on, and the options by which they were held out where that is done here."""
    warn_of_another_split(config)
    if config.val_split is None:
        return open_held_out(config.data, config, of_classes), {}
    _, source = open_splits(config.data, config.val_split, config.seed, config=config, of_classes=of_classes)
    return source, {"val_split": config.val_split, "seed": config.seed}


def classify_corrupted(
    config: EvaluateConfig,
    weights: Weights,
    view: EvaluationView,
    corruptions: dict[str, dict[str, Callable[[], Labelled]]],
) -> dict[str, Any]:
    """Error of the classifier by corruption and severity, the mean over all, and mCE where it is defined."""
    if config.crop_fraction is None:  # ImageNet-C's images are cropped already
        view = replace(view, crop_fraction=1.0)
    model = weights.classifier(config.backend).to(view.device)
    errors: dict[str, dict[str, float]] = {}
    images, unreadable = 0, []
    for name, severities in corruptions.items():
        errors[name] = {}
        for severity, open_source in severities.items():
            source = labelled_by_page(open_source(), view.reading)
            found, bad = accuracy_on(source, model, weights, view, f"{name} {severity}")
            errors[name][severity] = 1 - found["top1"]
            images += found["images"]
            unreadable += [image.name for image in bad]
    means = [sum(of_severity.values()) / len(of_severity) for of_severity in errors.values()]
    found = {
        "data": config.data,
        "images": images,
        "unreadable": unreadable,
        "errors": errors,
        "mean_error": sum(means) / len(means),
    }
    mce = mean_corruption_error(errors)
    if weights.num_classes == 1000 and mce is not None:
        found["mCE"] = mce
    return found


def accuracy_on(
    source: Labelled,
    model: nn.Module,
    weights: Weights,
    view: EvaluationView,
    description: str,
    per_image: Path | None = None,
    mistakes: bool = False,
) -> tuple[dict[str, Any], list[BadImage]]:
    """Accuracy of a classifier on labelled images, and the images that are unreadable and left out.

    An image's class is chosen among all of the head's outputs. Where the classes are some of ImageNet's WordNet ids, as
    in ImageNet-A and -R, it is chosen among these alone. per_image: a table to write of each image.
    mistakes: whether a picture of the worst answers comes with what is found.
    """
    outputs = outputs_of(source.classes, weights.num_classes, weights.classes)
    logits, index, bad = run_model(EvaluationSet(source, view), model, description)
    check_any(index, bad, source)
    labels = source.labels[index]
    some_of_imagenet = len(outputs) < weights.num_classes == 1000 and set(source.classes) <= set(wordnet_ids())
    if some_of_imagenet:
        logits, names = logits[:, outputs], list(source.classes)
    else:
        names = list(weights.classes or map(str, range(weights.num_classes)))
        for output, name in zip(outputs.tolist(), source.classes, strict=True):
            names[output] = name
        labels = outputs[labels]
    answers = Answers.of(logits, index, TOP)
    found = accuracy(answers.ranked, labels, tuple(names))
    if mistakes:
        found["mistakes"] = draw_mistakes(answers, labels, names, source, view)
    if per_image:
        images = (source.name(number) for number in index.tolist())
        write_table(rows_of(images, logits, [names[label] for label in labels.tolist()], names, TOP), per_image)
        print(f"each image: {per_image}")
    among = len(outputs) if some_of_imagenet else weights.num_classes
    return {"outputs": weights.num_classes, "among": among, **found}, bad


def report(found: dict[str, Any]) -> str:
    """What was measured, for people: one line for each thing."""
    lines = [f"{found['images']} images of {found['data']}"]
    if found.get("unreadable"):
        lines.append(f"{len(found['unreadable'])} more are unreadable, such as {found['unreadable'][0]}")
    for name, shown in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy"), ("mean_accuracy", "mean accuracy")):
        if name in found:
            lines.append(f"{shown} {100 * found[name]:.2f} %")
    for name, shown in (("mean_average_precision", "mAP"), ("f1", "F1 at a probability of one half")):
        if name in found:
            lines.append(f"{shown} {100 * found[name]:.2f} %")
    for name, shown in (("mae", "mean absolute error"), ("rmse", "root of the mean squared error"), ("r2", "R2")):
        if name in found:
            lines.append(f"{shown} {found[name]:.6g}")
    for name in ("top1", "top5", "knn_top1", "linear_probe_top1"):
        if name in found:
            lines.append(f"{name.replace('_', ' ').replace('top', 'top-')} {100 * found[name]:.2f} %")
    if "balanced_accuracy" in found:
        lines.append(f"balanced accuracy {100 * found['balanced_accuracy']:.2f} %, the mean over classes")
    if found.get("among", 0) < found.get("outputs", 0):
        lines.append(f"among the {found['among']} of {found['outputs']} classes that the folder has")
    for name, what in (
        ("by_class", "by class"),
        ("iou_by_class", "IoU by class"),
        ("average_precision_by_label", "average precision by label"),
    ):
        if name in found:
            worst = sorted(found[name].items(), key=lambda item: item[1])[:20]
            lines.append(f"{what}, the worst first: " + ", ".join(f"{of} {100 * value:.1f} %" for of, value in worst))
    for name, errors in found.get("errors", {}).items():
        lines.append(f"{name:20} error " + "  ".join(f"{100 * error:5.1f}" for error in errors.values()) + " %")
    if "mean_error" in found:
        lines.append(f"mean error {100 * found['mean_error']:.2f} %")
    if "mCE" in found:
        lines.append(f"mCE {100 * found['mCE']:.2f} %")
    return "\n".join(lines)


def save(found: dict[str, Any], mistakes: Image.Image | None, out: Path) -> None:
    """Writes what was measured into a folder, with the confusion matrix and mistakes in files of their own."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name in (CONFUSION, PICTURE, MISTAKES):  # what an earlier evaluation left
            (out / name).unlink(missing_ok=True)
    write_json(out / EVALUATION, {name: value for name, value in found.items() if name != "confusion"})
    if mistakes:
        save_picture(mistakes, out / MISTAKES)
    if "confusion" not in found:
        return
    write_atomic(out / CONFUSION, lambda p: p.write_text(json.dumps(found["confusion"]) + "\n"))
    try:
        draw_confusion(found["confusion"], out / PICTURE)
    except ImportError:
        print(f"{PICTURE} is not drawn, as matplotlib is not installed (extra: plots)")
