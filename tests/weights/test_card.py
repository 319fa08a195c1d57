"""The card beside exported weights: what it says, that its code runs, and that an edited one is never replaced."""

import pytest
import torch
import yaml
from helpers import relative_error
from PIL import Image

from sparse_fcmae import UserError, convert, load_classifier, pretrain
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.weights.adapters import TARGETS

FORM = ImageFormat("uint8", (100.0, 110.0, 120.5), (50.0, 51.0, 52.0))
HUB = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx"}


@pytest.mark.parametrize("to", [name for name in TARGETS if name != "aotinductor"])
def test_what_a_card_says(tmp_path, export_classifier, to):
    export_classifier(form=FORM)
    convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    card = (tmp_path / "theirs" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front.get("library_name") == HUB.get(to)
    assert front["pipeline_tag"] == ("image-feature-extraction" if to == "fcmae" else "image-classification")
    assert "- mean 100, 110, 120.5\n- deviation 50, 51, 52\n" in card
    assert ("cat, dog, newt" in card) == (to != "fcmae")
    assert "This is not recorded" in card
    assert "Whoever publishes these weights" in card


@torch.no_grad()
@pytest.mark.parametrize("to", ["official", "timm", "huggingface", "onnx", "torch-export"])
def test_the_code_in_a_card_runs(tmp_path, export_classifier, to):
    export_classifier("1-1-2-1:8-16-24-32", form=FORM)
    convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    code = (tmp_path / "theirs" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    Image.new("RGB", (90, 80), (9, 99, 200)).save(tmp_path / "image.png")
    model = load_classifier(tmp_path / "ours")
    images = model.preprocess(tmp_path / "image.png")
    names = {"images": images.numpy()}
    exec(code.replace("FOLDER", str(tmp_path / "theirs")).replace("image.png", str(tmp_path / "image.png")), names)
    if to == "official":
        found = names["logits"]
    elif to == "onnx":
        found = torch.from_numpy(names["outputs"][0])
    else:
        found = names["model"]
        found = found.eval()(images) if to != "torch-export" else found(images)
        found = found.logits if to == "huggingface" else found[0] if to == "torch-export" else found
    assert relative_error(found, model(images)) < 1e-5


def test_how_weights_came_about_goes_on_with_them(tmp_path, pictures):
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 20, "epochs": 1, "num_workers": 0, "seed": 3}
    pretrain(data=pictures, out=tmp_path / "run", **options)
    convert(tmp_path / "run", tmp_path / "timm", to="timm")
    for folder in (tmp_path / "run" / "exported", tmp_path / "timm"):
        card = (folder / "README.md").read_text()
        assert "It was pretrained by fully convolutional masked autoencoding by sparse-fcmae" in card
        assert "from random weights, on 40 images or windows of images." in card
        assert "epochs 1, batch size 20, lr " in card
        assert str(tmp_path) not in card


def test_a_card_that_someone_has_edited_is_not_replaced(tmp_path, export_encoder):
    export_encoder()
    convert(tmp_path / "ours", tmp_path / "theirs", to="timm")
    convert(tmp_path / "ours", tmp_path / "theirs", to="timm", overwrite=True)
    card = tmp_path / "theirs" / "README.md"
    card.write_text("# My model\n\nLicence: MIT\n")
    with pytest.raises(UserError, match=r"holds more than a conversion \(README.md\): choose another folder"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="timm", overwrite=True)
    assert "Licence: MIT" in card.read_text()
