"""What only a GPU can show: no waiting for it, graphs, compilation, memory, timed tiles. Run by `make test-gpu`."""

import json

import pytest
import torch
from helpers import randomise, relative_error

from sparse_fcmae import create_encoder, create_fcmae, pretrain, random_mask
from sparse_fcmae.backends import available_backends
from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.data.batches import Batch
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.ops import gelu_grn, reference
from sparse_fcmae.tasks.pretraining import PretrainingObjective
from sparse_fcmae.training.optim import adamw, set_lr
from sparse_fcmae.training.prefetch import prefetched
from sparse_fcmae.training.step import WARMUP, GraphedTrainStep, TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


def trained(kind, batches, steps, compiled=False):
    """Losses of `steps` steps, each of micro-batches of these sizes, and the model."""
    torch.manual_seed(0)
    model = create_fcmae("atto", image_size=64).to(GPU)
    optimizer = adamw(model, 0.05, (0.9, 0.95), capturable=kind is GraphedTrainStep)
    objective = PretrainingObjective(model, ImageFormat.imagenet(), model.num_visible((64, 64)))
    if compiled:
        objective.compile(fullgraph=True, dynamic=False)
    work = kind(objective, optimizer, images_per_rank=sum(batches), clip_grad=1.0, bf16=True)
    generator, losses = torch.Generator(GPU).manual_seed(0), []
    for step in range(steps):
        set_lr(optimizer, 2**-10)  # the same as a number and as a float32 tensor
        for i, size in enumerate(batches, 1):
            pixels = torch.randint(256, (size, 64, 64, 3), dtype=torch.uint8, device=GPU, generator=generator)
            mask = model.draw_mask(size, (64, 64), generator=generator)
            work.add(pixels, mask, last=i == len(batches))
        losses.append(work.finish().loss)
        if step == WARMUP:  # everything is compiled, timed and captured
            torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    return torch.stack(losses).tolist(), model


@pytest.fixture(autouse=True)
def _waiting_allowed():
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_native_kernels_serve_the_gpu():
    assert available_backends(GPU)["native"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encoder_equals_masked_dense_convolution(dtype):
    encoder = randomise(create_encoder("atto")).to(GPU)
    images, mask = torch.randn(4, 3, 96, 128, device=GPU), random_mask(4, (3, 4), 0.6, device=GPU)
    probe = torch.randn(4, 320, 3, 4, device=GPU)

    def run(backend, dtype):
        encoder.backend = backend
        encoder.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            features = encoder(images, mask, num_visible=4)
        (features.float() * probe).sum().backward()
        return features.float(), torch.cat([p.grad.flatten() for p in encoder.parameters()])

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact, plain, ours = run("masked", torch.float32), run("masked", dtype), run("native", dtype)
    for ideal, theirs, found, floor in zip(exact, plain, ours, (1e-5, 1e-4), strict=True):
        assert relative_error(found, ideal) < max(floor, 2 * relative_error(theirs, ideal))


def test_a_step_never_waits_for_the_device():
    losses, _ = trained(TrainStep, (6, 6, 4), WARMUP + 4)
    assert losses[-1] < losses[0]


def test_batches_are_copied_ahead_and_whole():
    """The kernels of each step are slow, so that copies overtake them and memory is used again as soon as it may be."""
    values = [torch.randint(256, (64, 224, 224, 3), dtype=torch.uint8).pin_memory() for _ in range(12)]
    batches = (Batch(pixels, torch.arange(64), []) for pixels in values)
    slow, sums = torch.randn(4096, 4096, device=GPU), []
    for batch in prefetched(batches, GPU):
        assert batch.pixels.device == GPU
        for _ in range(20):
            slow = slow @ slow / 64
        sums.append(batch.pixels.flatten(1).long().sum(1))
    for found, pixels in zip(sums, values, strict=True):
        assert torch.equal(found.cpu(), pixels.flatten(1).long().sum(1))
    assert len(list(prefetched(iter([]), GPU))) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_train_alike(compiled):
    (plain, model), (ours, graphed) = (trained(k, (6, 4), 8, compiled) for k in (TrainStep, GraphedTrainStep))
    assert ours == pytest.approx(plain, rel=1e-3)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (graphed, model)]
    assert relative_error(*weights) < 1e-2


def test_masks_and_patches_are_made_without_waiting():
    PatchMap.of(random_mask(8, (7, 7), 0.6, device=GPU), 19)
    torch.cuda.set_sync_debug_mode("error")
    visible = PatchMap.of(random_mask(8, (7, 7), 0.6, device=GPU), 19)
    visible.pooled("batch")
    torch.cuda.set_sync_debug_mode("default")
    assert (visible.patch_to_row >= 0).sum() == 8 * 19


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_encoder_compiles_whole(mode):
    encoder = randomise(create_encoder("atto")).to(GPU)
    images, mask = torch.randn(4, 3, 64, 64, device=GPU), random_mask(4, (2, 2), 0.5, device=GPU)
    compiled = torch.compile(encoder, fullgraph=True, mode=mode)
    for _ in range(3):
        features = compiled(images, mask, num_visible=2).clone()
        features.sum().backward()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert relative_error(features, encoder(images, mask, num_visible=2)) < 2e-3


def test_little_is_kept_for_the_backward_pass():
    images, mask = torch.randn(32, 3, 224, 224, device=GPU), random_mask(32, (7, 7), 0.6, device=GPU)
    taken = {}
    for backend in ("native", "masked"):
        encoder = create_encoder("tiny", backend=backend).to(GPU)
        for _ in range(2):  # the first also times tiles
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                features = encoder(images, mask, num_visible=19)
            taken[backend] = torch.cuda.memory_allocated() - before
            features.float().sum().backward()
            del features
    assert taken["native"] < taken["masked"] / 6


def test_timing_tiles_does_not_spoil_what_is_overwritten():
    from sparse_fcmae.kernels.triton.gelu_grn import gelu_grn_backward, unscale_kernel

    x, gamma = torch.randn(40, 4, 4, 96, device=GPU, requires_grad=True), torch.randn(96, device=GPU)
    offsets, probe = torch.tensor([0, 15, 40], device=GPU), torch.randn(40, 4, 4, 96, device=GPU)
    (expected,) = torch.autograd.grad(reference.gelu_grn(x, gamma, offsets), x, probe)
    (ours,) = torch.autograd.grad(gelu_grn(x, gamma, offsets), x, probe)
    assert relative_error(ours, expected) < 1e-4
    unscale_kernel.cache.clear()
    unscale_kernel.cache_results = False
    rows, grad = x.detach().view(-1, 96), probe.clone().view(-1, 96)
    response = rows.new_empty(2, 96)
    for image, (first, last) in enumerate(((0, 15 * 16), (15 * 16, 40 * 16))):
        response[image] = torch.nn.functional.gelu(rows[first:last]).norm(dim=0)
    sums = tuple(torch.zeros(96, device=GPU) for _ in range(3))
    gelu_grn_backward(grad, rows, gamma, offsets * 16, response, grad_x=grad, sums=sums, out=torch.empty_like(rows))
    assert relative_error(grad.view(x.shape), expected) < 1e-4


@pytest.mark.parametrize("flags", [{}, {"cuda_graphs": False}, {"compile": True}])
def test_pretraining(pictures, tmp_path, flags):
    run = {"model": "atto", "image_size": 64, "stem_stride": 2, "batch_size": 10, "micro_batch_size": 6, "epochs": 2}
    pretrain(data=pictures, out=tmp_path / "run", **run, lr=1e-3, device="cuda", num_workers=1, **flags)
    graphs = flags.get("cuda_graphs", True)
    assert ("from CUDA graphs" in (tmp_path / "run" / "train.log").read_text()) == graphs
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"]
