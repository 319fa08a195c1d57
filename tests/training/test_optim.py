import pytest
import torch
from timm.optim import param_groups_weight_decay

from sparse_fcmae import create_classifier, create_fcmae
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.training.optim import adamw, layer_scale, load_optimizer, set_lr


def test_optimizer_goes_on_with_or_without_graphs():
    """A rate in a tensor, for graphs, gives what a number gives, and loads what either has saved."""
    results = []
    for first, second in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        state = None
        for capturable in (first, second):
            optimizer = adamw(layer, 0.1, (0.9, 0.95), capturable=capturable)
            if state:
                load_optimizer(optimizer, state)
            for step in range(3):
                set_lr(optimizer, 1e-2 / (step + 1))
                layer(torch.ones(2, 3)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) is capturable
            state = optimizer.state_dict()
        results.append(layer.weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def official_layer(name, depths, grouped):
    """The layer's number as the official code's optim_factory.py has it, which was read for this table."""
    part = name.split(".")
    if part[0] == "downsample_layers":
        return {0: 0, 1: 2, 2: 3, 3: 12}[int(part[1])] if grouped else sum(depths[: int(part[1])]) + 1
    if part[0] == "stages":
        stage, block = int(part[1]), int(part[2])
        if not grouped:
            return sum(depths[:stage]) + block + 1
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage]
    return 13 if grouped else sum(depths) + 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["atto", "tiny", "base"])
def test_layer_decay(name, grouped):
    with torch.device("meta"):
        model = create_classifier(name)
    depths = SIZES[name][0]
    scale = layer_scale(0.6, depths, grouped)
    last = 13 if grouped else sum(depths) + 1
    for key, _ in model.named_parameters():
        assert scale(key) == pytest.approx(0.6 ** (last - official_layer(key, depths, grouped)))
    optimizer = adamw(model, 0.1, (0.9, 0.999), undecayed=(".gamma", ".beta"), scale=scale)
    grouped_parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped_parameters) == len(set(map(id, grouped_parameters))) == len(list(model.parameters()))
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        vector = parameter.ndim == 1 or key.endswith(("gamma", "beta"))
        assert by_id[id(parameter)]["weight_decay"] == (0 if vector else 0.1)
        assert by_id[id(parameter)]["lr_scale"] == scale(key)


def test_pretraining_decays_what_the_official_code_decays():
    """timm's rule for parameters of one dimension: the response norms and the mask token decay. In fine-tuning the
    official code leaves the response norms out."""
    model = create_fcmae("atto")
    groups = param_groups_weight_decay(model, 0.05)
    theirs = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    ours = adamw(model, 0.05, (0.9, 0.95))
    found = {id(p): group["weight_decay"] for group in ours.param_groups for p in group["params"]}
    assert found == theirs
    names = dict(model.named_parameters())
    assert found[id(names["mask_token"])] == found[id(names["decoder.0.grn.gamma"])] == 0.05
    assert found[id(names["decoder.0.norm.weight"])] == found[id(names["pred.bias"])] == 0
