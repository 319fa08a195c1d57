"""What pretraining holds in memory: bytes of the model's state, and of what forward passes keep for the backward pass.

Counted from the shapes of what the network's modules and ops keep, for the backend `native`.
"""

from dataclasses import dataclass

from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.model.convnext import size_of

KEEPS_FROM = {"cpu": 96, "cuda": 0}  # channels from which on a block keeps its hidden features, as the kernels have it
STATES = {"weights": 4, "gradients": 4, "moments": 8}  # bytes a parameter, float32, with AdamW


@dataclass(frozen=True)
class Kept:
    """Bytes of one image: what encoder, decoder and loss keep, and what the loss's backward pass needs beside."""

    encoder: float
    decoder: float
    loss: float
    beside: float

    @property
    def together(self) -> float:
        return self.encoder + self.decoder + self.loss + self.beside


def kept(
    name: str,
    *,
    grid: tuple[int, int],
    visible: int,
    in_chans: int = 3,
    stem_stride: int = 4,
    decoder_dim: int = 512,
    decoder_depth: int = 1,
    bf16: bool = True,
    device: str = "cuda",
    checkpointed: bool = False,
    pixel_bytes: int = 1,
) -> Kept:
    """What one image takes in a training step, in bytes.

    grid: rows and columns of its patches. visible: how many of them are. bf16: the matrix products' dtype; features
    between blocks are float32. device: "cpu" or "cuda". checkpointed: blocks keep their inputs alone. pixel_bytes: of a
    channel of a pixel, as images are stored.
    """
    depths, dims = size_of(name)
    product, patches, pixels = 2 if bf16 else 4, grid[0] * grid[1], (SIDES[0] * stem_stride) ** 2 * in_chans

    def blocks(positions: float, width: int, depth: int) -> float:
        keeps = not checkpointed and width >= KEEPS_FROM[device]
        return depth * positions * width * (4 + (4 * product if keeps else 0))

    encoder = 0.0
    for i, (side, depth, dim) in enumerate(zip(SIDES, depths, dims, strict=True)):
        positions, inputs = visible * side**2, 4 * dims[i - 1]
        # between stages what the norm takes, and what the convolution takes; the stem keeps the images alone
        encoder += blocks(positions, dim, depth) + (positions * inputs * (4 + product) if i else 0)
    masked = patches - visible
    # what the projection takes, what the blocks keep, what the prediction takes
    decoder = (visible * dims[-1] + masked * decoder_dim) * product + blocks(patches, decoder_dim, decoder_depth)
    predicted = masked * pixels * product
    return Kept(encoder, decoder, patches * pixels * pixel_bytes + predicted, predicted)
