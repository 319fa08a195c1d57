"""A training step of the encoder (forward and backward), backend against backend.

All backends run on the same images, masks and weights, taking turns, so that the ratios hold on a noisy machine
although the times do not. A backend whose features or gradients are not those of `masked` is refused, not reported: in
float32 they must be equal, in bfloat16 as near to `masked` in float32 as `masked` in bfloat16 is, within a factor.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.timing import draw_mask, kept_megabytes, kept_of, relative, take_turns
from sparse_fcmae.config import ThroughputConfig, image_size_of
from sparse_fcmae.encoder import SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import write_json
from sparse_fcmae.training.distributed import choose_device

BASELINE = "masked"
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative Frobenius error, float32
ROUNDING_FACTOR = 2  # of the baseline's own bfloat16 error


def throughput(**options: Any) -> list[dict[str, Any]]:
    """Prints and returns a row a backend; options are those of `ThroughputConfig`."""
    config = ThroughputConfig(**options)
    if config.batch_size < 1 or config.rounds < 1:
        raise UserError("--batch-size and --rounds must be at least 1")
    device, size = choose_device(config.device), image_size_of(config.image_size)
    torch.manual_seed(0)
    encoder = SparseEncoder(config.model, image_size=size).to(device)
    with torch.no_grad():
        for parameter in encoder.parameters():  # GRN and biases start at zero and would go untested
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = torch.randn(config.batch_size, 3, *size, device=device)
    grid = encoder.grid(*size)
    mask, kept = draw_mask(config.batch_size, grid, config.mask_ratio).to(device), kept_of(grid, config.mask_ratio)
    bf16 = config.dtype == "bf16"

    def forward(backend: str) -> Tensor:
        encoder.backend = backend
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return encoder(images, mask, kept)

    def step(backend: str) -> None:
        encoder.zero_grad()
        forward(backend).float().square().mean().backward()

    usable = [name for name, layout in BACKENDS.items() if layout.unusable(device) is None]
    errors, names = gate(encoder, images, mask, usable, bf16)
    times = take_turns({name: lambda name=name: step(name) for name in names}, config.rounds, device)
    rows = []
    for name in BACKENDS:
        row: dict[str, Any] = {"backend": name}
        if name not in usable:
            row["refused"] = BACKENDS[name].unusable(device)
        else:
            row["forward_error"], row["gradient_error"] = errors[name]
            if name not in names:
                row["refused"] = "features or gradients differ"
            else:
                row["ms"] = 1e3 * statistics.median(times[name])
                row["images_per_second"] = config.batch_size / statistics.median(times[name])
                row["kept_mb"] = kept_megabytes(lambda name=name: forward(name))
                row["speedup"] = statistics.median(b / t for b, t in zip(times[BASELINE], times[name], strict=True))
        rows.append(row)
    setting = {
        **{k: getattr(config, k) for k in ("model", "batch_size", "image_size", "mask_ratio", "dtype")},
        **{"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    columns = f"{'backend':8} {'ms':>9} {'images/s':>9} {'over ' + BASELINE:>12} {'MB kept':>9}"
    print(f"{columns}   error of features and gradients")
    for row in rows:
        error = f"{row['forward_error']:.0e} {row['gradient_error']:.0e}" if "forward_error" in row else ""
        if "refused" in row:
            print(f"{row['backend']:8} refused: {row['refused']} {error}")
        else:
            speed = f"{row['ms']:9.1f} {row['images_per_second']:9.1f} {row['speedup']:12.2f} {row['kept_mb']:9.0f}"
            print(f"{row['backend']:8} {speed}   {error}")
    if config.json:
        write_json(Path(config.json), {"setting": setting, "rows": rows})
    return rows


def gate(
    encoder: SparseEncoder, images: Tensor, mask: Tensor, backends: list[str], bf16: bool
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Errors of each backend's features and of all its gradients against BASELINE in float32, and who passes.

    In float32 the second error is the greatest of any parameter, in bfloat16 that of all of them as one vector.
    """
    rows, cols = mask.shape[1:]
    probe = torch.randn(len(images), encoder.num_features, rows, cols, device=images.device)

    def values(backend: str, half: bool) -> tuple[Tensor, list[Tensor]]:
        encoder.backend = backend
        encoder.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            features = encoder(images, mask)
        (features.float() * probe).sum().backward()
        return features.detach(), [p.grad.clone() for p in encoder.parameters()]

    def error(backend: str, half: bool) -> tuple[float, float]:
        ours, grads = values(backend, half)
        if half:
            return relative(ours, features), relative(
                *(torch.cat([g.flatten() for g in s]) for s in (grads, gradients))
            )
        return relative(ours, features), max(relative(a, b) for a, b in zip(grads, gradients, strict=True))

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features, gradients = values(BASELINE, half=False)
        exact = {name: error(name, half=False) for name in backends}
        passing = [n for n, (f, g) in exact.items() if f < FORWARD_TOLERANCE and g < GRADIENT_TOLERANCE]
        if not bf16:
            return exact, passing
        rounded = {name: error(name, half=True) for name in passing}
    limit = [ROUNDING_FACTOR * e for e in rounded[BASELINE]]
    return exact | rounded, [n for n, (f, g) in rounded.items() if f <= limit[0] and g <= limit[1]]
