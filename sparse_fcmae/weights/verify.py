"""Runs written weights and what they were written from on the same images, and refuses them where results differ."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.model.masking import random_mask
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, write_json, writing
from sparse_fcmae.weights.adapter import CONFIG, TOLERANCE, Adapter, Outputs, Target
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.graph import STAGES, GraphTarget
from sparse_fcmae.weights.read import read_weights
from sparse_fcmae.weights.weights import Weights, patch_size_of

NORM_TOLERANCE = 1e-3  # of what another epsilon in a source's final norm changes


@torch.no_grad()
def verify(weights: Weights, target: Target, path: Path) -> list[str]:
    """Checks the folder or file that weights were written to; returns what was done, a line each.

    The library that the weights are from and the one that they were written for run them where they can be imported.
    This package runs them too, with masked images where the weights or the target are for pretraining. Raises UserError
    where a result differs from what this package makes of the weights by more than TOLERANCE.
    """
    weights = weights.per_image()
    patch = patch_size_of(weights.architecture)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, weights.architecture["in_chans"], 2 * patch, 3 * patch, generator=generator)
    expected = _run(weights, images)
    lines = _run_source(weights, images)
    if isinstance(target, Adapter):
        mask = random_mask(2, (2, 3), 0.5, generator=generator) if weights.sparse or target.sparse else None
        lines += _read_back(weights, target, path, images, expected, mask)
    if target.library and (path.is_dir() or not target.configs):
        lines.append(_run_result(weights, target, path, images, expected))
    if isinstance(target, GraphTarget):
        images = torch.randn(2, weights.architecture["in_chans"], 3 * patch, target.least * patch, generator=generator)
        lines.append(f"{_run_result(weights, target, path, images, _run(weights, images))}, in another size")
    return lines


def _run(weights: Weights, images: Tensor, backend: str = "auto", eps: float = EPS) -> Outputs:
    """What this package computes with weights. Without a final norm the pooled features are normalised all the same.

    eps: what the final norm adds to the variance; this package's adds EPS.
    """
    encoder, state = weights.encoder(backend), weights.state
    maps = encoder.features(images)
    features, stages = maps[-1], dict(zip(STAGES, maps, strict=True))
    shape = (encoder.num_features,)
    pooled = F.layer_norm(features.mean((2, 3)), shape, state.get("norm.weight"), state.get("norm.bias"), eps=eps)
    if not weights.num_classes:
        return {"features": features, "pooled": pooled, **stages}
    return {"features": features, "logits": F.linear(pooled, state["head.weight"], state["head.bias"]), **stages}


def _run_source(weights: Weights, images: Tensor) -> list[str]:
    """Has the library that the weights are from run them, as they were read and as their own config says.

    Where they came without one, as a file alone does, the library gets the config that follows from their shapes.
    """
    source = TARGETS[weights.layout]
    if not (weights.original and source.library and isinstance(source, Adapter)):
        return []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with writing(folder):
            source.save_tensors(weights.original, folder / source.weights_file)
            if weights.config:
                write_json(folder / CONFIG, weights.config)
            else:
                source.write_configs(weights, folder)
        try:
            found = source.run(folder, weights, images)
        except UserError as error:
            return [f"source not run by the library: {error}"]
        except Exception as error:  # say at an encoder without the norm that the library's always has
            return [_not_taken(source, "source", error)]
    how = f"source run by {source.library} with {'its own config' if weights.config else 'a config made of its shapes'}"
    eps = source.norm_eps(weights.config) if weights.config else EPS
    same = _compare(source.outputs(weights), _run(weights, images, eps=eps), found, how)
    if eps == EPS:
        return [same]
    norms = f"the final norm adds {EPS:g} to the variance here, and {eps:g} there"
    change = _difference(source.outputs(weights), _run(weights, images), found, how)
    if change >= NORM_TOLERANCE:
        raise UserError(f"not written: source and result differ by {change:.1e}, as {norms}")
    return [same, f"{norms}: for that alone the outputs differ by {max(change, 1e-9):.0e}"]


def _read_back(
    weights: Weights, target: Adapter, path: Path, images: Tensor, expected: Outputs, mask: Tensor | None
) -> list[str]:
    """Runs what was written by this package's plain PyTorch, once more with a mask where there is one."""
    result = read_weights(path).per_image()
    how = "result read back by sparse-fcmae"
    lines = [_compare(target.outputs(weights), expected, _run(result, images, "masked"), how)]
    if mask is not None:
        expected = {"features": weights.encoder()(images, mask)}
        found = {"features": result.encoder("masked")(images, mask)}
        lines.append(_compare(("features",), expected, found, f"{how}, half of the patches masked"))
    return lines


def _run_result(weights: Weights, target: Target, path: Path, images: Tensor, expected: Outputs) -> str:
    """Has the library that the weights were written for run them."""
    try:
        found = target.run(path, weights, images)
    except UserError as error:
        return f"result not run by the library: {error}"
    except Exception as error:
        raise UserError(f"not written: {_not_taken(target, 'result', error)}") from None
    return _compare(target.outputs(weights), expected, found, f"result run by {target.library}", target.tolerance)


def _not_taken(target: Target, what: str, error: Exception) -> str:
    return f"{target.library} does not take the {what}: {one_line(error)[:200]}"


def _compare(names: tuple[str, ...], expected: Outputs, found: Outputs, how: str, tolerance: float = TOLERANCE) -> str:
    """A line that says that the outputs of these names are equal. Raises UserError where they are not."""
    worst = _difference(names, expected, found, how)
    if worst >= tolerance:
        raise UserError(f"not written: source and result differ by {worst:.1e} ({how})")
    return f"verified: {how}, equal within {max(worst, 1e-9):.0e}"


def _difference(names: tuple[str, ...], expected: Outputs, found: Outputs, how: str) -> float:
    """The greatest relative error of these outputs. Raises UserError for other shapes, and values not finite."""
    errors = []
    for name in names:
        a, b = expected[name], found[name]
        if a.shape != b.shape:
            raise UserError(f"not written: the {name} are {list(b.shape)}, not {list(a.shape)} ({how})")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"not written: the {name} are not finite ({how})")
        errors.append(((b - a).norm() / a.norm().clamp_min(1e-30)).item())
    return max(errors)
