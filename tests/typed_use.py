"""How people use the public names, for a type checker: tests/test_package.py has mypy look at it. It is never run."""

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type  # typing has it from Python 3.11 on

import sparse_fcmae as sf
from sparse_fcmae.data.transform import Transform
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.model.segmenter import Segmenter

images = torch.randn(1, 3, 224, 224)

encoder = sf.load_encoder("runs/first")
assert_type(encoder, SparseEncoder)
assert_type(encoder.features(images), tuple[Tensor, ...])
assert_type(encoder.preprocess(["photo.jpg"]), Tensor)
assert_type(encoder.with_backend("torch"), SparseEncoder)

classifier = sf.load_classifier(Path("runs/tuned"), backend="auto")
assert_type(classifier, Classifier)
names: tuple[str, ...] | None = classifier.classes

assert_type(sf.load_segmenter("runs/masks"), Segmenter)
assert_type(sf.load_fcmae("runs/first"), FCMAE)
assert_type(sf.load_transform("runs/first"), Transform)
assert_type(sf.create_encoder("atto", image_size=(64, 96), in_chans=13), SparseEncoder)
assert_type(sf.create_classifier("tiny", num_classes=10), Classifier)
assert_type(sf.create_fcmae("base", mask_ratio=0.6), FCMAE)
assert_type(sf.random_mask(2, (7, 7), 0.6), Tensor)
assert_type(sf.available_backends("cpu"), dict[str, str | None])

run: Path = sf.pretrain(data="IMAGES", out="runs/first", epochs=100)
tuned: Path = sf.finetune(data="LABELLED", init=str(run), out="runs/tuned")
features: Path = sf.embed(data="IMAGES", init=str(run), out="features.npz")
table: Path = sf.predict(data="IMAGES", init=str(tuned), out="predictions.csv")
report: str = sf.convert(run, "first-timm", to="timm")
top1: float = sf.evaluate(data="LABELLED", init=str(tuned))["top1"]

try:
    sf.pretrain(data="IMAGES", mask_ratio=2.0)
except sf.UserError as error:
    print(error)
