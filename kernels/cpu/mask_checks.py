"""Whether tensors that describe a mask fit together, so that no kernel can be led out of bounds by them."""

from torch import Tensor

from sparse_fcmae.kernels.cpu.library import INT, LONG, POINTER, Kernel
from sparse_fcmae.kernels.parameters import grid_of

_one_mask = Kernel("one_mask", POINTER, POINTER, *[LONG] * 4, POINTER, LONG, result=INT)


def one_mask(patch_to_row: Tensor, row_to_patch: Tensor, image_offsets: Tensor | None = None) -> bool:
    """Whether both maps describe one mask.

    image_offsets, if given, ascend from 0 to T, and must not divide the patches of an image.
    """
    images, grid = patch_to_row.shape[0], grid_of(patch_to_row)
    maps = (patch_to_row.contiguous(), row_to_patch.contiguous())
    offsets = None if image_offsets is None else image_offsets.contiguous()
    count = 0 if offsets is None else len(offsets)
    return bool(_one_mask(*maps, images, *grid, len(row_to_patch), offsets, count))


def within(rows: Tensor, patches: int) -> bool:
    """Whether all rows are numbers of so many patches."""
    return not len(rows) or (rows.min().item() >= 0 and rows.max().item() < patches)


def ascending(image_offsets: Tensor, patches: int) -> bool:
    """Whether offsets ascend from 0 to the number of patches."""
    ends = image_offsets.tolist()
    return ends[0] == 0 and ends[-1] == patches and ends == sorted(ends)
