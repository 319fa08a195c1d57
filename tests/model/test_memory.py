"""What is counted of memory against what autograd really keeps."""

import pytest
import torch

from sparse_fcmae import create_fcmae
from sparse_fcmae.kernels.cpu.convnext_block import KEEP_CHANNELS
from sparse_fcmae.model.memory import KEEPS_FROM, kept


def kept_by_autograd(model, batch, size, bf16):
    """Bytes that the graph of a loss holds, without parameters."""
    channels, mask = model.encoder.in_chans, model.draw_mask(batch, size)
    images = torch.randint(256, (batch, channels, *size), dtype=torch.uint8)
    statistics = torch.tensor([[100.0] * channels, [50.0] * channels], dtype=torch.float64)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = tensor  # which also keeps the address from being used again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.errors(images, mask, model.num_visible(size), statistics)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize(
    ("name", "options", "bf16"),
    [
        ("atto", {"image_size": 224}, False),
        ("atto", {"image_size": 224}, True),
        (
            "atto",
            {"image_size": (64, 96), "stem_stride": 1, "in_chans": 2, "decoder_dim": 64, "decoder_depth": 3},
            True,
        ),
        ("tiny", {"image_size": 224}, True),
        ("1-2-3-1:64-96-160-320", {"image_size": (160, 192), "mask_ratio": 0.75}, False),
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_is_what_autograd_keeps(name, options, bf16, checkpointed):
    model = create_fcmae(name, **options)
    for module in model.modules():
        if hasattr(module, "checkpointed"):
            module.checkpointed = checkpointed
    size = model.encoder.image_size
    of_image = (kept_by_autograd(model, 6, size, bf16) - kept_by_autograd(model, 2, size, bf16)) / 4
    found = kept(
        name,
        grid=model.encoder.grid(*size),
        visible=model.num_visible(size),
        bf16=bf16,
        device="cpu",
        checkpointed=checkpointed,
        **{key: options[key] for key in ("in_chans", "stem_stride", "decoder_dim", "decoder_depth") if key in options},
    )
    assert found.encoder + found.decoder + found.loss == pytest.approx(of_image, rel=0.04)


def test_which_blocks_keep_their_hidden_features_is_as_the_kernels_have_it():
    triton = pytest.importorskip("triton")  # noqa: F841
    from sparse_fcmae.kernels.triton.convnext_block import keeps_hidden

    assert KEEPS_FROM["cpu"] == KEEP_CHANNELS
    assert keeps_hidden(KEEPS_FROM["cuda"])
