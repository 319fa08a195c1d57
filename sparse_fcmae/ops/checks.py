"""Whether the tensors given to an op are what it takes. Most functions raise ValueError where they are not."""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.kernels.constants import HALO, SIDES, WINDOW
from sparse_fcmae.kernels.parameters import PIXEL_DTYPES, grid_of
from sparse_fcmae.ops.context import transformed


def check_differentiation(op: str) -> None:
    """No kernel computes a tangent or knows a transform. Raises RuntimeError, as PyTorch does where it can't do so."""
    if transformed():
        raise RuntimeError(
            f"{op} can't be transformed by torch.func or differentiated forward: give `backend=masked`, plain PyTorch"
        )


def differentiable_once(backward: torch.library.CustomOpDef) -> None:
    """Has an op that computes gradients say so where these are differentiated again."""

    def refuse(ctx, *grads):
        raise RuntimeError("the native kernels are differentiable once: give `backend=masked` for second derivatives")

    backward.register_autograd(refuse)


def check_features(x: Tensor) -> None:
    """x is [T, S, S, C], S one of 8, 4, 2, 1. Its dtype is for `kernels.check_dtype`."""
    if x.dim() != 4 or x.shape[1] != x.shape[2] or x.shape[1] not in SIDES:
        raise ValueError(f"x must be [T, S, S, C] with S one of {', '.join(map(str, SIDES))}, not {tuple(x.shape)}")


def check_row(name: str, row: Tensor | None, x: Tensor) -> None:
    """row is [C], on x's device, or None."""
    if row is None:
        return
    if row.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, not {row.device}")
    if row.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be [{x.shape[-1]}], not {tuple(row.shape)}")


def check_depthwise_weight(weight: Tensor, x: Tensor) -> None:
    """weight is [C, 1, 7, 7], on x's device."""
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, not {weight.device}")
    if weight.shape != (x.shape[3], 1, WINDOW, WINDOW):
        raise ValueError(f"weight must be [{x.shape[3]}, 1, {WINDOW}, {WINDOW}], not {tuple(weight.shape)}")


def check_patch_map(x: Tensor, patch_to_row: Tensor, row_to_patch: Tensor, image_offsets: Tensor | None = None) -> None:
    """The maps describe the mask of the patches x, and the offsets, if given, do not divide an image's patches.

    On a GPU shapes and dtypes alone are checked, as the host would have to wait for the values.
    """
    if patch_to_row.device != x.device or patch_to_row.dtype != torch.int32 or patch_to_row.dim() != 3:
        raise ValueError(f"patch_to_row must be int32 [B, rows + {2 * HALO}, cols + {2 * HALO}] on {x.device}")
    if min(grid_of(patch_to_row)) < 0:
        shape = tuple(patch_to_row.shape)
        raise ValueError(f"patch_to_row must be [B, rows + {2 * HALO}, cols + {2 * HALO}], not {shape}")
    if row_to_patch.device != x.device or row_to_patch.dtype != torch.int64 or row_to_patch.shape != x.shape[:1]:
        raise ValueError(f"row_to_patch must be int64 [{x.shape[0]}] on {x.device}")
    if not kernels.load("mask_checks", x.device).one_mask(patch_to_row, row_to_patch, image_offsets):
        raise ValueError("patch_to_row, row_to_patch and image_offsets are not of one mask")


def check_pixels(pixels: Tensor, statistics: Tensor | None, side: int, device: torch.device) -> None:
    """Pixels are [B, C, H, W], on the device, of a dtype that the kernels read, in patches of `side`.

    statistics, if given, are float64 [2, C].
    """
    if pixels.device != device or pixels.dim() != 4 or pixels.dtype not in PIXEL_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in PIXEL_DTYPES)
        raise ValueError(f"pixels must be [B, C, H, W] on {device}, of {names}, not {pixels.dtype} on {pixels.device}")
    if any(length % side for length in pixels.shape[2:]):
        raise ValueError(f"pixels of {pixels.shape[2]}x{pixels.shape[3]} are not patches of {side}x{side}")
    if statistics is None:
        return
    if statistics.device != device or statistics.dtype != torch.float64 or statistics.shape != (2, pixels.shape[1]):
        raise ValueError(f"statistics must be float64 [2, {pixels.shape[1]}] on {device}")


def check_patches(rows: Tensor, pixels: Tensor, side: int) -> None:
    """Rows are int64 [N], each a patch's flat position in [B, H / side, W / side]. On a GPU they are not looked at."""
    if rows.device != pixels.device or rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows must be int64 [N] on {pixels.device}")
    batch, _, height, width = pixels.shape
    if not kernels.load("mask_checks", pixels.device).within(rows, batch * (height // side) * (width // side)):
        raise ValueError("rows must be patches of the images")


def check_image_offsets(x: Tensor, image_offsets: Tensor) -> None:
    """The offsets ascend from 0 to the number of patches x. On a GPU their values are not looked at."""
    on_device = image_offsets.device == x.device
    if not on_device or image_offsets.dtype != torch.int64 or image_offsets.dim() != 1 or not len(image_offsets):
        raise ValueError(f"image_offsets must be int64 [B + 1] on {x.device}")
    if not kernels.load("mask_checks", x.device).ascending(image_offsets, len(x)):
        raise ValueError(f"image_offsets must ascend from 0 to {len(x)}")
