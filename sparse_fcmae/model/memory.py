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
    """Bytes of one image: what encoder and decoder keep, and what the loss needs beside while it is computed."""

    encoder: float
    decoder: float
    loss: float

    @property
    def together(self) -> float:
        return self.encoder + self.decoder + self.loss


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
) -> Kept:
    """What one image takes in a training step, in bytes.

    grid: rows and columns of its patches. visible: how many of them are. bf16: the matrix products' dtype; features
    between blocks are float32. device: "cpu" or "cuda". checkpointed: blocks keep their inputs alone.
    """
    depths, dims = size_of(name)
    product, patches, pixels = 2 if bf16 else 4, grid[0] * grid[1], (SIDES[0] * stem_stride) ** 2 * in_chans

    def blocks(positions: float, width: int, depth: int) -> float:
        keeps = not checkpointed and width >= KEEPS_FROM[device]
        return depth * positions * width * (4 + (4 * product if keeps else 0))

    encoder = 0.0
    for i, (side, depth, dim) in enumerate(zip(SIDES, depths, dims, strict=True)):
        positions, inputs = visible * side**2, 4 * dims[i - 1] if i else in_chans * stem_stride**2
        encoder += positions * inputs * product + blocks(positions, dim, depth)
        # what the norm takes: of the stem what its convolution gave, later the last stage's features
        encoder += positions * (dim * product if i == 0 else inputs * 4)
    # its features as the projection takes them; what that gave and the blocks gave; what the prediction takes
    decoder = patches * (dims[-1] + decoder_dim) * product + patches * decoder_dim * 4
    decoder += blocks(patches, decoder_dim, decoder_depth)
    # prediction and target are kept; the images and a gradient of the prediction are there at the same time
    return Kept(encoder, decoder, 4 * patches * pixels * 4)
