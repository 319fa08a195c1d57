"""`minkowski`: the convolutions by MinkowskiEngine, which the official pretraining code uses, to compare with.

All else is as in `torch`. MinkowskiEngine finds the neighbours of a position by hashing. It is given its positions in
the order of the blocks, so that nothing has to be put in order between its convolutions.
"""

import collections
import collections.abc
import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparse_fcmae.backends.layers import is_depthwise
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.runtime.files import one_line


class MinkowskiPatches(TorchPatches):
    """Features are [T, P, P, C] as in `torch`, and to MinkowskiEngine the list of their T * P * P positions."""

    name = "minkowski"
    compilable = False
    dense_backend = "masked"  # as in the official code, whose decoder is dense

    def __init__(self, mask: Tensor, num_visible: int | None = None) -> None:
        super().__init__(mask, num_visible)
        self.manager, self.keys = None, {}
        if not len(self.map.row_to_patch):  # MinkowskiEngine crashes on a list without positions
            return
        corners, device = torch.stack(self.map.coordinates, 1), mask.device
        self.manager = engine().CoordinateManager(D=2, coordinate_map_type=_map_type(device))
        for side in SIDES:
            within = torch.cartesian_prod(*map(torch.arange, (1, side, side))).to(device)
            scale = torch.tensor([1, SIDES[0], SIDES[0]], device=device)
            positions = corners[:, None] * scale + within * (SIDES[0] // side)
            key, _ = self.manager.insert_and_map(positions.flatten(0, 1).int().contiguous(), [SIDES[0] // side] * 2)
            self.keys[side] = key

    @staticmethod
    def unusable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
        if not importlib.util.find_spec("MinkowskiEngine"):
            return "MinkowskiEngine is not installed: see docs/benchmarks.md for `make minkowski`"
        try:
            on_gpus = engine().is_cuda_available()
        except Exception as error:  # built for another torch, or without a library that it needs
            return f"MinkowskiEngine can't be imported: {one_line(error)}"
        if device.type != "cpu" and not (device.type == "cuda" and on_gpus):
            return f"this MinkowskiEngine was built without {device.type}"
        if dtype not in (torch.float32, torch.float64):
            return f"MinkowskiEngine computes in fp32, not in {str(dtype).removeprefix('torch.')}: give `dtype=fp32`"
        return None

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        by_engine = self.manager and is_depthwise(conv)
        return self._convolve(x, conv, x.shape[1]) if by_engine else super().dwconv(x, conv)

    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return self._convolve(x, conv, x.shape[1] // conv.stride[0]) if self.manager else super().tile_conv(x, conv)

    def _convolve(self, x: Tensor, conv: nn.Conv2d, side: int) -> Tensor:
        shape = (len(x), side, side, conv.out_channels)
        layer = _layer(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.groups > 1, x.device)
        kernel = conv.weight.permute(3, 2, 1, 0).flatten(0, 1)  # taps from left to right, then down: [k * k, in, out]
        parameters = {"kernel": kernel[:, 0] if conv.groups > 1 else kernel, "bias": conv.bias[None]}
        positions = engine().SparseTensor(
            x.flatten(0, 2), coordinate_map_key=self.keys[x.shape[1]], coordinate_manager=self.manager
        )
        return functional_call(layer, parameters, (positions, self.keys[side])).F.view(shape)


@cache
def engine() -> ModuleType:
    """The module MinkowskiEngine, which looks for a name that Python 3.10 has taken away."""
    collections.Sequence = collections.abc.Sequence
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CPU_ONLY.*")
            return importlib.import_module("MinkowskiEngine")
    finally:
        del collections.Sequence


def _map_type(device: torch.device):
    kinds = engine().CoordinateMapType
    return kinds.CUDA if device.type == "cuda" else kinds.CPU


@cache
def _layer(inputs: int, outputs: int, kernel_size: int, depthwise: bool, device: torch.device) -> nn.Module:
    """One of its layers, to be called with the encoder's parameters."""
    options = {"kernel_size": kernel_size, "bias": True, "dimension": 2}
    with torch.random.fork_rng(devices=[]):  # for the parameters that it draws and will not use
        if not depthwise:
            return engine().MinkowskiConvolution(inputs, outputs, stride=kernel_size, **options).to(device)
        kinds = ("MinkowskiDepthwiseConvolution", "MinkowskiChannelwiseConvolution")  # the first in a fork, for CUDA
        kind = next(k for k in kinds[device.type == "cpu" :] if hasattr(engine(), k))
        return getattr(engine(), kind)(inputs, **options).to(device)
