"""Any checkpoint -> any layout: read, renamed, written beside its destination, run against its source, put in place."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.classifier import Classifier
from sparse_fcmae.config import ConvertConfig
from sparse_fcmae.encoder import SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import new_folder, one_line, save_pickled, save_tensors, write_atomic, write_json, writing
from sparse_fcmae.formats.layouts import LAYOUTS
from sparse_fcmae.formats.libraries import LIBRARIES, MMPRETRAIN_CONFIG, Library, Run, entry
from sparse_fcmae.formats.onnx import export_onnx, run_onnx
from sparse_fcmae.formats.weights import CONFIG, PROCESSOR, Weights, read_weights, weights_file
from sparse_fcmae.masking import random_mask

TOLERANCE = 1e-5  # relative Frobenius error in float32
TARGETS = (*LIBRARIES, "onnx")
SUFFIXES = (".safetensors", ".pt", ".pth")
ONNX = "model.onnx"
DATA = ".data"  # behind the name of an ONNX graph whose weights lie beside it
WRITTEN = {library.weights for library in LIBRARIES.values()}
OURS = WRITTEN | {CONFIG, PROCESSOR, MMPRETRAIN_CONFIG, ONNX, ONNX + DATA}  # what a conversion's folder may hold


def convert(
    source: str | Path, destination: str | Path, *, to: str, overwrite: bool = False, dry_run: bool = False
) -> str:
    """Writes the weights of a checkpoint in layout `to`; returns what was done, a line each.

    source: whatever `read_weights` reads. destination: a folder, or a file that ends in .safetensors, .pt or .pth, for
    onnx in .onnx. It appears only after what was written has been read back and found equal to the source (features and
    logits, fp32, 1e-5), by the real library where that can be imported. dry_run: do all that, and leave nothing.
    Raises UserError where anything is amiss, with `destination` untouched.
    """
    config = ConvertConfig(
        source=str(source), destination=str(destination), to=to, overwrite=overwrite, dry_run=dry_run
    )
    if config.to not in TARGETS:
        raise UserError(f"unknown layout {config.to!r}: choose --to {', '.join(TARGETS)}")
    target = Path(config.destination)
    name = _file_name(target, config.to)
    whole = config.to == "fcmae"  # which has a place for the decoder
    source = weights_file(Path(config.source), whole)
    _check_destination(target, source, config.overwrite, single=name is not None)
    weights = read_weights(config.source, whole=whole)
    lines = [_what_was_read(weights, config.source), *weights.notes]
    lines += _lost(weights, config.to, single=name is not None)
    with _destination(target, name, config.dry_run) as folder:
        with writing(target):
            lines += write(weights, folder, config.to, name)
        lines += verify(weights, folder, config.to, name)
    return "\n".join([*lines, f"{'would write' if config.dry_run else 'wrote'} {target}"])


def export_model(model: SparseEncoder, folder: Path, classes: tuple[str, ...] | None = None) -> None:
    """Writes an encoder or classifier under the official names, with the config that `load_encoder` reads, verified."""
    weights = Weights.of(model, classes)
    with new_folder(folder) as temporary:
        with writing(folder):
            write(weights, temporary, "official")
        verify(weights, temporary, "official")


def write(weights: Weights, folder: Path, to: str, name: str | None = None) -> list[str]:
    """Fills a folder with the weights in a layout and their configs, or with one file `name` of the weights alone.

    Returns what was mapped, added and left out, a line each.
    """
    if to == "onnx":
        export_onnx(weights, folder / (name or ONNX))
        dropped = [_left_out("decoder")] if weights.has_decoder else []
        return [f"exported {'the classifier' if weights.num_classes else 'the encoder'} with a dynamic batch", *dropped]
    library, lines = LIBRARIES[to], []
    state = weights.without(*library.drops)
    if library.norm and "norm.weight" not in state:
        features = len(state["stages.3.0.norm.weight"])
        state |= {"norm.weight": torch.ones(features), "norm.bias": torch.zeros(features)}
        lines.append("added the final norm as the identity, as the source has none")
    tensors = LAYOUTS[to].convert(state)
    _save(tensors, folder / (name or library.weights), library)
    kept = replace(weights, state=state, classes=weights.classes if "head.weight" in state else None)
    for file, content in {} if name else library.configs(kept).items():
        if isinstance(content, str):
            (folder / file).write_text(content)
        else:
            write_json(folder / file, content)
    present = {key.split(".")[0] for key in weights.state}
    dropped = [part for part in library.drops if {"decoder": "mask_token"}.get(part, part) in present]
    return [f"mapped {len(tensors)} tensors to the names of {to}", *lines, *map(_left_out, dropped)]


def _save(tensors: dict[str, Tensor], file: Path, library: Library) -> None:
    if file.suffix == ".safetensors":
        save_tensors(tensors, file)
        return
    save_pickled({library.wrapper: tensors} if library.wrapper else tensors, file)


@torch.no_grad()
def verify(weights: Weights, folder: Path, to: str, name: str | None = None) -> list[str]:
    """Runs source and result on the same images, masked too where the source is sparse; returns a line for each way.

    Raises UserError where features, or logits, differ by more than TOLERANCE.
    """
    weights = weights.per_image()
    patch = 8 * weights.architecture["stem_stride"]
    generator = torch.Generator().manual_seed(0)
    size = weights.architecture["image_size"] if to == "onnx" else (2 * patch, 3 * patch)
    images = torch.randn(2, weights.architecture["in_chans"], *size, generator=generator)
    expected = _ours(weights)(images)
    lines = []
    own = LIBRARIES.get(weights.layout)
    if weights.original and own and own.module:
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary)
            with writing(source):
                _save(weights.original, source / own.weights, own)
                for file, content in own.configs(weights).items():
                    write_json(source / file, content)
            lines += _by_library(own, source, weights, images, expected, "source")
    if to == "onnx":
        for batch in (images, images[:1]):
            result = run_onnx(folder / (name or ONNX), batch)
            _compare((expected[1 if weights.num_classes else 0][: len(batch)],), (result,), "result run by onnxruntime")
        return [*lines, "verified: result run by onnxruntime on batches of 2 and 1, equal"]
    library = LIBRARIES[to]
    result = read_weights(folder / name if name else folder).per_image()
    how = "result read back by sparse-fcmae"
    compared = slice(0, 1) if "head" in library.drops else slice(0, 2)
    lines.append(_compare(expected[compared], _ours(result, "masked")(images)[compared], how))
    if weights.sparse or to == "fcmae":
        mask = random_mask(2, (2, 3), 0.5, generator=generator)
        features = (weights.encoder()(images, mask), result.encoder("masked")(images, mask))
        lines.append(_compare(features[:1], features[1:], f"{how}, half of the patches masked"))
    if library.module and not name:
        lines += _by_library(library, folder, weights, images, expected, "result")
    return lines


def _ours(weights: Weights, backend: str = "auto") -> Run:
    """Images -> features, and logits or, without a head, the norm of their mean, by this package."""
    encoder, state = weights.encoder(backend), weights.state

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features = encoder(images)
        shape = (encoder.num_features,)
        x = F.layer_norm(features.mean((2, 3)), shape, state.get("norm.weight"), state.get("norm.bias"), eps=1e-6)
        return features, F.linear(x, state["head.weight"], state["head.bias"]) if weights.num_classes else x

    return run


def _by_library(
    library: Library, folder: Path, weights: Weights, images: Tensor, expected: tuple[Tensor, ...], what: str
) -> list[str]:
    assert library.run
    try:
        loaded = entry(library.module, library.name)
    except UserError as error:
        return [f"{what} not run by the library: {error}"]
    try:
        found = library.run(loaded, folder, weights)(images)
    except Exception as error:
        reason = f"{library.module} does not take the {what}: {one_line(error)[:200]}"
        if what == "source":  # say an encoder without the norm that the library's always has
            return [reason]
        raise UserError(f"not written: {reason}") from None
    return [_compare(expected, found, f"{what} run by {library.module}")]


def _compare(expected: tuple[Tensor, ...], found: tuple[Tensor, ...], how: str) -> str:
    if not all(x.isfinite().all() for x in (*expected, *found)):
        raise UserError(f"not written: features or logits are not finite ({how})")
    errors = [((b - a).norm() / a.norm().clamp_min(1e-30)).item() for a, b in zip(expected, found, strict=True)]
    if max(errors) >= TOLERANCE:
        raise UserError(f"not written: the result differs from the source by {max(errors):.1e} ({how})")
    return f"verified: {how}, equal within {max(*errors, 1e-9):.0e}"


def _what_was_read(weights: Weights, source: str) -> str:
    shape = weights.architecture
    kind = f"classifier of {weights.num_classes}" if weights.num_classes else "encoder"
    if weights.has_decoder:
        kind += " with decoder"
    return (
        f"read {source}: {weights.layout} names, {kind}, {shape['name']}, {shape['in_chans']} input channels, "
        f"stem stride {shape['stem_stride']}, {len(weights.state)} tensors"
    )


def _lost(weights: Weights, to: str, single: bool) -> list[str]:
    """What the target can't express, a line each."""
    lines, (height, width) = [], weights.architecture["image_size"]
    if weights.architecture["grn_scope"] == "batch" and (single or to not in ("official", "fcmae")):
        lines.append("the response norm pools over each image there, not over the batch as in pretraining")
    if single and to != "onnx":
        lines.append("image size, class names and normalisation are not in such a file: a folder has them")
    elif to == "huggingface" and height != width:
        lines.append(f"the image size becomes {min(height, width)}, as it knows squares only")
    return lines


def _left_out(part: str) -> str:
    reason = "pretraining alone uses it" if part == "decoder" else "a model for pretraining has none"
    return f"left out the {part}: {reason}"


def classifier_example(model: Classifier, folder: Path, data: str) -> str:
    """Commands and code to paste that use an exported classifier."""
    height, width = model.image_size
    return (
        f"    sparse-fcmae evaluate --init {quote(str(folder))} --data {quote(data)}\n"
        f"    sparse-fcmae convert {quote(str(folder))} {quote(f'{folder}-huggingface')} --to huggingface\n\n"
        "or\n\n"
        "    import torch\n"
        "    from sparse_fcmae import load_classifier\n\n"
        f"    classifier = load_classifier({str(folder)!r})\n"
        f"    images = torch.randn(1, {model.in_chans}, {height}, {width})  # normalised as in config.json\n"
        f"    logits = classifier(images)  # [1, {model.num_classes}], the classes as in config.json\n"
    )


def usage_example(encoder: SparseEncoder, folder: Path) -> str:
    """Code to paste that uses an exported encoder, and the commands that convert it."""
    height, width = encoder.image_size
    rows, cols = encoder.grid(height, width)
    layouts = ["huggingface"] if encoder.stem_stride == 2 else ["timm", "huggingface"]
    commands = [f"sparse-fcmae convert {quote(str(folder))} {quote(f'{folder}-{to}')} --to {to}" for to in layouts]
    return (
        "    import torch\n"
        "    from sparse_fcmae import load_encoder\n\n"
        f"    encoder = load_encoder({str(folder)!r})\n"
        f"    images = torch.randn(1, {encoder.in_chans}, {height}, {width})  # normalised as in config.json\n"
        f"    features = encoder(images)  # [1, {encoder.num_features}, {rows}, {cols}]\n\n"
        "or convert it\n\n" + "".join(f"    {command}\n" for command in commands)
    )


@contextmanager
def _destination(target: Path, name: str | None, dry_run: bool) -> Iterator[Path]:
    """A folder to fill, whose content becomes the target, be it a folder or the file `name`, when all went well."""
    if dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    elif name is None:
        with new_folder(target) as folder:
            yield folder
    else:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
        with temporary as folder:
            yield Path(folder)
            files = sorted(Path(folder).iterdir(), reverse=True)  # an ONNX graph after its data
            for file in files:
                write_atomic(target.with_name(file.name), _mover(file))
            for stale in set(_files(target)) - {target.with_name(file.name) for file in files}:
                stale.unlink(missing_ok=True)


def _mover(file: Path) -> Callable[[Path], None]:
    return lambda to: os.replace(file, to)


def _file_name(target: Path, to: str) -> str | None:
    """The target's name where it is a file, None where it is a folder; UserError where that does not go with `to`."""
    suffixes = (".onnx",) if to == "onnx" else SUFFIXES
    if target.suffix in suffixes:
        return target.name
    if target.suffix in (*SUFFIXES, ".onnx", ".bin", ".ckpt"):
        raise UserError(f"--to {to} can't write {target}: name a folder, or a file that ends in {', '.join(suffixes)}")
    return None


def _files(target: Path) -> list[Path]:
    """The target's file, and where that is an ONNX graph, the one that may have to lie beside it."""
    return [target, target.with_name(target.name + DATA)] if target.suffix == ".onnx" else [target]


def _check_destination(target: Path, source: Path, overwrite: bool, single: bool) -> None:
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{source} would be replaced by its own conversion: choose another destination than {target}")
    if single:
        if target.is_dir():
            raise UserError(f"{target} is a folder: name another")
        for file in _files(target):
            if file.exists() and not overwrite:
                raise UserError(f"{file} is there already: choose another or give --overwrite")
        return
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{target} is not empty: choose another folder or give --overwrite")
        foreign = {p.name for p in target.iterdir()} - OURS
        if foreign:
            raise UserError(f"{target} holds more than a conversion ({min(foreign)}): choose another folder")
