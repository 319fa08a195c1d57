"""What a run prints to paste does what it says."""

import re
import shlex
import textwrap

import pytest
import torch

from sparse_fcmae import create_classifier, create_encoder
from sparse_fcmae.cli import parse
from sparse_fcmae.weights.convert import export_model
from sparse_fcmae.weights.examples import classifier_example, usage_example


def program(text):
    """The lines of Python in a text."""
    block = text[text.index("    import torch") :]
    return textwrap.dedent("\n".join(block.split("\n\nor convert")[0].splitlines()))


def commands(text):
    return [shlex.split(line)[1:] for line in re.findall(r"^ *(sparse-fcmae .*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("stem_stride", [4, 2])
def test_an_encoders_example(tmp_path, stem_stride):
    folder = tmp_path / "with a 'quote'" / "exported"
    encoder = create_encoder("atto", image_size=(64, 96), in_chans=1, stem_stride=stem_stride)
    export_model(encoder, folder)
    text = usage_example(encoder, folder)
    names = {}
    exec(program(text), names)
    (comment,) = re.findall(r"features = encoder\(images\)  # \[(.*)\]", text)
    assert names["features"].shape == torch.Size(map(int, comment.split(",")))
    targets = []
    for arguments in commands(text):
        command, options = parse(arguments)
        assert command.run == "weights.convert:convert"
        assert options["source"] == str(folder)
        targets.append(options["to"])
    assert targets == (["timm", "huggingface"] if stem_stride == 4 else ["huggingface"])


def test_a_classifiers_example(tmp_path):
    folder, data = tmp_path / "exported", tmp_path / "my images"
    model = create_classifier("atto", num_classes=3, image_size=32)
    export_model(model, folder, ("a", "b", "c"))
    text = classifier_example(model, folder, str(data), 0.25, 7)
    names = {}
    exec(program(text), names)
    assert names["logits"].shape == (1, 3)
    found = [(command.run.split(":")[1], options) for command, options in map(parse, commands(text))]
    assert "--val-split" not in classifier_example(model, folder, str(data), None, 7)
    assert found == [
        ("evaluate", {"init": str(folder), "data": str(data), "val_split": 0.25, "seed": 7}),
        ("convert", {"source": str(folder), "destination": f"{folder}-huggingface", "to": "huggingface"}),
    ]
