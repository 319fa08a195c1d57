"""Fixtures; and what lets timm be imported beside a CPU build of torch."""

import os
import sys

import pytest
import torch
from PIL import Image

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms may ask for
os.environ.setdefault("SPARSE_FCMAE_PRODUCTS", "mm")  # or processes that measure at once may round differently
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from sparse_fcmae.demo import draw_images

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # torchvision's compiled part is missing: its schemas are enough for timm
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    SCHEMAS = torch.library.Library("torchvision", "DEF")
    SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Has torch.empty and its like return NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 drawn images in class folders."""
    folder = tmp_path_factory.mktemp("pictures") / "images"
    draw_images(folder, 40, seed=0)
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """A folder with train and val, each of 8 and 4 plain pictures in folders blue, green and red."""
    root = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 8), ("val", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = [20 + 5 * i] * 3
                colour[2 - channel] = 200 + 5 * i
                Image.new("RGB", (32, 32), tuple(colour)).save(folder / f"{i}.png")
    return root
