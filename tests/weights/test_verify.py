import pytest
import torch
from helpers import randomise

from sparse_fcmae import UserError, create_classifier, create_encoder
from sparse_fcmae.backends.masked import MaskedPatches
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.convert import write
from sparse_fcmae.weights.read import read_weights
from sparse_fcmae.weights.verify import _run, verify
from sparse_fcmae.weights.weights import Weights


@pytest.fixture(scope="module")
def weights():
    return Weights.of(randomise(create_classifier("atto", num_classes=3, image_size=32)))


@pytest.mark.parametrize(
    ("to", "key"),
    [
        ("official", "stages.2.3.grn.beta"),
        ("mmpretrain", "downsample_layers.0.0.weight"),
        ("huggingface", "head.bias"),
        ("timm", "stages.0.1.dwconv.weight"),
    ],
)
def test_a_conversion_with_one_wrong_tensor_is_refused(tmp_path, monkeypatch, weights, to, key):
    target = TARGETS[to]
    right = target.from_official

    def wrong(state):
        return right({**state, key: state[key] + 1e-2 * torch.randn_like(state[key])})

    monkeypatch.setattr(target, "from_official", wrong)
    write(weights, target, tmp_path)
    with pytest.raises(UserError, match="differ"):
        verify(weights, target, tmp_path)


def test_what_is_right_is_said_to_be(tmp_path):
    weights, target = Weights.of(randomise(create_encoder("atto", image_size=32))), TARGETS["official"]
    write(weights, target, tmp_path)
    lines = verify(weights, target, tmp_path)
    assert lines
    assert all("verified" in line for line in lines)


@pytest.fixture
def timm(monkeypatch):
    """timm's target with a library that computes what this package does; `change` makes it compute something else."""
    target = TARGETS["timm"]

    def let_it(change=lambda outputs: outputs):
        monkeypatch.setattr(target, "run", lambda path, weights, images: change(_run(weights, images)))
        return target

    return let_it


def changed(name, by):
    return lambda outputs: outputs | {name: outputs[name] * (1 + by)}


def test_a_library_that_computes_the_same_is_named(tmp_path, weights, timm):
    target = timm()
    write(weights, target, tmp_path)
    lines = verify(weights, target, tmp_path)
    assert [line.split(", equal within")[0] for line in lines] == [
        "verified: result read back by sparse-fcmae",
        "verified: result run by timm",
    ]


@pytest.mark.parametrize("name", ["features", "logits"])
def test_a_library_that_computes_something_else_is_believed(tmp_path, weights, timm, name):
    target = timm(changed(name, 2e-5))
    write(weights, target, tmp_path)
    with pytest.raises(UserError, match=r"not written: the result differs from the source by 2.0e-05 \(result run by"):
        verify(weights, target, tmp_path)
    assert verify(weights, timm(changed(name, 5e-6)), tmp_path)  # which is rounding


def test_a_library_that_does_not_take_the_result_refuses_it(tmp_path, weights, timm):
    def fail(outputs):
        raise KeyError("head.fc.weight\nis unknown")

    write(weights, timm(), tmp_path)
    with pytest.raises(UserError, match=r"not written: timm does not take the result: 'head.fc.weight") as error:
        verify(weights, timm(fail), tmp_path)
    assert "\n" not in str(error.value)


def test_a_library_that_is_missing_is_said_to_be(tmp_path, weights, timm):
    def missing(outputs):
        raise UserError("timm is not installed: pip install timm")

    write(weights, timm(), tmp_path)
    lines = verify(weights, timm(missing), tmp_path)
    assert lines[-1] == "result not run by the library: timm is not installed: pip install timm"


def test_a_source_is_run_as_it_was_read(tmp_path, weights, timm):
    """The tensors of the source under its own names, beside configs of its own."""
    write(weights, timm(), tmp_path)
    source, seen = read_weights(tmp_path), []

    def look(path, weights, images):
        seen.append(sorted(p.name for p in path.iterdir()))
        assert read_weights(path).original.keys() == source.original.keys()
        return _run(weights, images)

    official = TARGETS["official"]
    write(source, official, tmp_path)
    target = timm()
    target.run = look
    assert "source run by timm" in verify(source, official, tmp_path)[0]
    assert seen == [["config.json", "model.safetensors"]]
    target.run = lambda path, weights, images: changed("logits", 1e-3)(_run(weights, images))
    with pytest.raises(UserError, match=r"differs from the source by 1.0e-03 \(source run by timm\)"):
        verify(source, official, tmp_path)


def test_a_mistake_that_shows_on_masked_images_alone_is_found(tmp_path, monkeypatch):
    weights, target = Weights.of(randomise(create_encoder("atto"))), TARGETS["fcmae"]
    write(weights, target, tmp_path)
    lines = verify(weights, target, tmp_path)
    assert any("half of the patches masked" in line for line in lines)
    monkeypatch.setattr(MaskedPatches, "dwconv", lambda self, x, conv: conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    with pytest.raises(UserError, match=r"differs from the source by .* half of the patches masked\)"):
        verify(weights, target, tmp_path)


def test_results_that_are_not_finite_are_not_called_equal(tmp_path):
    encoder = randomise(create_encoder("atto", image_size=32))
    with torch.no_grad():
        encoder.stages[3][1].pwconv2.weight.fill_(1e38)
        encoder.stages[3][1].pwconv2.bias.fill_(3e38)
    weights, target = Weights.of(encoder), TARGETS["official"]
    write(weights, target, tmp_path)
    with pytest.raises(UserError, match=r"not written: the features are not finite \(result read back"):
        verify(weights, target, tmp_path)
