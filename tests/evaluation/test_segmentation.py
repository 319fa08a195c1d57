"""Masks that are predicted: how they are judged, put together from windows, and written."""

import json

import numpy as np
import pytest
import torch
from helpers import fails, randomise, relative_error
from PIL import Image

from sparse_fcmae import UserError, convert, create_encoder, embed, evaluate, load_segmenter, predict
from sparse_fcmae.data.config import MaskConfig
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.masks import IGNORED, MaskClasses
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.sources.masked import open_masked
from sparse_fcmae.evaluation import predict_masks
from sparse_fcmae.evaluation.overlays import stitched
from sparse_fcmae.evaluation.predict_masks import logits_by, mask_files, save_mask
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.evaluation.segmentation import confusion, measure_tiles, scores
from sparse_fcmae.evaluation.tiles import Tiles, owned, segmented
from sparse_fcmae.model.segmenter import Segmenter
from sparse_fcmae.weights.convert import export_model
from sparse_fcmae.weights.segmenter import export_segmenter

FORM = ImageFormat("uint8", (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
CLASSES = MaskClasses((0, 5, 9), ("ground", "road", "tree"), (255,))
SIZES = ((70, 50), (33, 64), (96, 41))  # width, height


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter") / "exported"
    torch.manual_seed(0)
    model = randomise(Segmenter("atto", num_classes=3, head_channels=8, image_size=32, stem_stride=1)).eval()
    export_segmenter(model, folder, CLASSES, FORM)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images and masks of odd sizes; one pixel in ten is ignored."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        mask = rng.choice([0, 5, 9, 255], (height, width), p=[0.3, 0.3, 0.3, 0.1]).astype(np.uint8)
        for name, values in (("images", rng.integers(0, 256, (height, width, 3), np.uint8)), ("masks", mask)):
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(values).save(root / name / f"{number}.png")
    return root


def view(size=(32, 32), native=True):
    return EvaluationView(size, FORM, Reading(), 1.0, torch.device("cpu"), batch_size=2, native=native)


def by_colour(images):
    """A model that looks at each pixel by itself: the channel that is greatest."""
    return images


def test_scores_are_those_of_a_brute_count():
    rng = np.random.default_rng(0)
    labels, found = rng.integers(-1, 4, (50, 40)), rng.integers(0, 4, (50, 40))
    found[labels == 3] = 2  # a class that is never found, and one that is in no mask
    labels[labels == 1] = 0
    counts = confusion(torch.from_numpy(labels).short(), torch.from_numpy(found).short(), 5)
    value = scores(counts, ("a", "b", "c", "d", "e"))
    kept = labels >= 0
    iou = {}
    for number, name in enumerate("abcde"):
        true, said = (labels == number) & kept, (found == number) & kept
        if (true | said).any():
            iou[name] = (true & said).sum() / (true | said).sum()
    assert value["iou_by_class"] == pytest.approx(iou)
    assert "e" not in iou
    assert value["miou"] == pytest.approx(np.mean(list(iou.values())))
    assert value["pixel_accuracy"] == pytest.approx((labels == found)[kept].mean())
    assert value["mean_accuracy"] == pytest.approx(
        np.mean([(labels[labels == n] == found[labels == n]).mean() for n in (0, 2, 3)])
    )


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (100, 75), (64, 200)])
def test_each_pixel_is_the_nearest_tiles(size, data):
    tiles = Tiles(ImageFolder(data / "images"), None, (32, 32), Reading())
    boxes = tiles.boxes(*size)
    count = np.zeros(size[::-1], int)
    for (left, top, right, bottom), (x, y, to_x, to_y) in zip(boxes, owned(boxes, size), strict=True):
        assert left <= x < to_x <= right
        assert top <= y < to_y <= bottom
        count[y:to_y, x:to_x] += 1
        inner = [left == 0 or x - left >= 5, right == size[0] or right - to_x >= 5]
        assert all(inner)  # a third of a window lies under two, so that each has a margin of 5 pixels at least
    assert (count == 1).all()


@pytest.mark.parametrize("native", [True, False])
def test_windows_and_wholes_are_judged_and_put_together_alike(data, native):
    images = open_masked(str(data), MaskConfig()).images
    tiles = Tiles(images.source, images.masks, (32, 32) if native else None, Reading())
    seen = view(native=native)
    counts, bad = measure_tiles(by_colour, tiles, range(len(tiles)), seen, CLASSES)
    assert not bad
    expected = torch.zeros(3, 3, dtype=torch.int64)
    together = dict(stitched(segmented(tiles, range(len(tiles)), seen, by_colour, None, []), tiles))
    assert sorted(together) == [0, 1, 2]
    for number, found in together.items():
        assert found.shape == SIZES[number][::-1]
        mask = np.asarray(Image.open(data / "masks" / f"{number}.png"))
        labels = CLASSES.labels(mask)
        assert ((labels == IGNORED) == (mask == 255)).all()
        expected += confusion(torch.from_numpy(labels), torch.from_numpy(found), 3)
        if native:
            pixels = np.asarray(Image.open(data / "images" / f"{number}.png"))
            assert (found == ((pixels - np.array(FORM.mean)) / np.array(FORM.std)).argmax(-1)).all()
    assert torch.equal(counts, expected)


def test_what_is_written_is_what_is_loaded(segmenter, tmp_path):
    model = load_segmenter(segmenter)
    assert not model.training
    assert model.classes == ("ground", "road", "tree")
    assert "segmentation into 3 classes" in (segmenter / "README.md").read_text()
    export_model(create_encoder("atto"), tmp_path / "encoder")
    with pytest.raises(UserError, match="is no segmentation model: fine-tune one by `task=segmentation`"):
        load_segmenter(tmp_path / "encoder")


def test_masks_go_on_and_flips_are_turned_back(segmenter, data, tmp_path, monkeypatch):
    options = {"data": data / "images", "init": segmenter, "num_workers": 0, "dtype": "fp32", "crop": "native"}
    out = predict(out=tmp_path / "masks", maps=tmp_path / "maps", **options)
    masks = {number: np.asarray(Image.open(out / f"{number}.png")) for number in range(3)}
    assert [mask.shape for mask in masks.values()] == [size[::-1] for size in SIZES]
    assert set(np.unique(np.concatenate([mask.ravel() for mask in masks.values()]))) <= {0, 5, 9}
    assert {path.name for path in (tmp_path / "maps").glob("*.png")} == {"0.png", "1.png", "2.png"}
    assert json.loads((out / "masks.json").read_text())["classes"] == {"0": "ground", "5": "road", "9": "tree"}
    before = (out / "1.png").stat().st_mtime_ns
    (out / "2.png").unlink()
    predict(out=tmp_path / "masks", maps=tmp_path / "maps", **options)
    assert (out / "1.png").stat().st_mtime_ns == before
    assert (np.asarray(Image.open(out / "2.png")) == masks[2]).all()

    flipped = tmp_path / "flipped"
    flipped.mkdir()
    for number in range(3):
        Image.open(data / "images" / f"{number}.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
            flipped / f"{number}.png"
        )
    both = [
        predict(out=tmp_path / name, **options | {"data": images, "flips": "horizontal"})
        for name, images in (("a", data / "images"), ("b", flipped))
    ]
    for number in range(3):
        one, other = (np.asarray(Image.open(folder / f"{number}.png")) for folder in both)
        # but for the column in the middle of what two windows share, which goes to one of them
        assert (one == other[:, ::-1]).mean() > 0.95
    with pytest.raises(UserError, match="holds masks with another flips"):
        predict(out=tmp_path / "masks", maps=tmp_path / "maps", flips="both", **options)
    predict(out=tmp_path / "masks", maps=tmp_path / "maps", flips="both", overwrite=True, **options)


def test_what_is_not_this_commands_is_left_alone(segmenter, data, tmp_path, capsys):
    usual = ["predict", "--data", data / "images", "--init", segmenter, "--num-workers", 0]
    for number, content in enumerate(({"annotations": [1]}, [1, 2])):
        own = tmp_path / str(number)
        own.mkdir()
        (own / "masks.json").write_text(json.dumps(content))
        (own / "0.png").write_text("mine")
        for where in (["--out", own], ["--out", tmp_path / "free", "--maps", own]):
            assert "holds no masks of this command" in fails(capsys, *usual, *where, "--overwrite")
        assert (own / "0.png").read_text() == "mine"
    options = {"init": segmenter, "num_workers": 0, "dtype": "fp32"}
    out = predict(data=data / "images", out=tmp_path / "masks", maps=tmp_path / "maps", **options)
    (tmp_path / "maps" / "1.png").unlink()
    predict(data=data / "images", out=out, maps=tmp_path / "maps", **options)
    assert (tmp_path / "maps" / "1.png").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.png").write_bytes((data / "images" / "0.png").read_bytes())
    (other / "broken.png").write_bytes(b"no image")
    for _ in range(2):  # the second time nothing is left to do but the broken one
        predict(data=other, out=out, maps=tmp_path / "maps", overwrite=_ == 0, **options)
        assert "left out 1 that can't be read" in capsys.readouterr().out
        assert sorted(path.name for path in out.glob("*.png")) == ["z.png"]
    (other / "sub" / "deep").mkdir(parents=True)
    (other / "z.png").rename(other / "sub" / "deep" / "z.png")
    predict(data=other, out=out, overwrite=True, **options)
    assert (out / "sub" / "deep" / "z.png").exists()
    (out / "sub" / "mine.txt").touch()
    (out / "sub" / "deep" / "z.png").rename(out / "mine.png")
    (out / "sub" / "deep" / "z.png").symlink_to(out / "mine.png")
    predict(data=data / "images", out=out, overwrite=True, **options)
    assert not (out / "sub" / "deep").exists()
    assert (out / "sub" / "mine.txt").exists()
    assert (out / "mine.png").exists()


def test_an_interruption_says_how_to_go_on(segmenter, data, tmp_path, capsys, monkeypatch):
    saved = []

    def interrupted(path, mask):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save_mask(path, mask)

    options = {"data": data / "images", "init": segmenter, "out": tmp_path / "masks", "num_workers": 0}
    monkeypatch.setattr(predict_masks, "save_mask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(**options)
    assert "interrupted: 1 of 3 masks are in" in capsys.readouterr().out
    monkeypatch.undo()
    predict(**options)
    assert "masks of 2 images go to" in capsys.readouterr().out


def test_evaluate_reports_classes(segmenter, data, tmp_path, capsys):
    found = evaluate(data=str(data), init=str(segmenter), out=str(tmp_path / "out"), num_workers=0)
    assert found["images"] == 3
    assert found["iou_by_class"].keys() == {"ground", "road", "tree"}
    said = capsys.readouterr().out
    assert "mIoU" in said
    assert " % of the pixels are ignored, as the model was trained" in said
    saved = json.loads((tmp_path / "out" / "confusion.json").read_text())
    assert sum(map(sum, saved["counts"])) == sum(
        int((np.asarray(Image.open(data / "masks" / f"{n}.png")) != 255).sum()) for n in range(3)
    )
    assert (tmp_path / "out" / "confusion.png").exists()


def test_transformers_runs_it(segmenter, tmp_path):
    from transformers import AutoModelForSemanticSegmentation

    report = convert(segmenter, tmp_path / "hf", to="huggingface")
    assert "verified: result run by transformers, equal within" in report
    assert "the values that masks have are not kept" in report
    other = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval()
    assert other.config.id2label == {0: "ground", 1: "road", 2: "tree"}
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert relative_error(other(images).logits, load_segmenter(segmenter)(images)) < 1e-5
    assert "UperNetForSemanticSegmentation.from_pretrained" in (tmp_path / "hf" / "README.md").read_text()
    assert "would write" in convert(segmenter, tmp_path / "dry", to="huggingface", dry_run=True)
    assert not (tmp_path / "dry").exists()
    with pytest.raises(UserError, match="overwrite"):
        convert(segmenter, tmp_path / "hf", to="huggingface")
    assert "left out what is no part of the encoder" in convert(segmenter, tmp_path / "timm", to="timm")


def test_its_encoder_is_an_encoder(segmenter, data, tmp_path):
    file = embed(data=data / "images", init=segmenter, out=tmp_path / "features.npz", num_workers=0)
    assert np.load(file)["features"].shape == (3, 320)


def test_names_of_masks():
    class Named:
        names = ("a/b.jpg", "a/b.png", "c d?.tif", "/deep/e.png", "row 1 (x.png)", "..", "a-b.jpg")

        def __len__(self):
            return len(self.names)

        def name(self, index):
            return self.names[index]

    files = mask_files(Named())
    assert files == ["a/b.jpg.png", "a/b.png.png", "c-d-.png", "deep/e.png", "row-1-x.png", "5.png", "a-b.png"]


def test_mistakes_are_one_line(segmenter, data, tmp_path, capsys):
    usual = ["predict", "--data", data / "images", "--init", segmenter, "--num-workers", 0, "--out"]
    assert "so name a folder" in fails(capsys, *usual, tmp_path / "x.csv")
    assert "--top-k is of a classifier" in fails(capsys, *usual, tmp_path / "x", "--top-k", 3)
    assert "lies among the images" in fails(capsys, *usual, data / "images" / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "own.txt").write_text("mine")
    assert "is not empty and holds no masks of this command" in fails(capsys, *usual, tmp_path / "full")
    assert (tmp_path / "full" / "own.txt").read_text() == "mine"
    assert "lie in each other" in fails(capsys, *usual, tmp_path / "x", "--maps", tmp_path / "x")
    assert "--ignore is not for a segmentation model" in fails(
        capsys, "evaluate", "--data", data, "--init", segmenter, "--ignore", 3
    )
    other = tmp_path / "other"
    for name in ("images", "masks"):
        (other / name).mkdir(parents=True)
        Image.fromarray(np.full((40, 40, 3)[: 3 if name == "images" else 2], 77, np.uint8)).save(other / name / "0.png")
    judge = ["evaluate", "--data", other, "--init", segmenter, "--num-workers", 0]
    assert "masks have the value 77, which is none of the model's classes (0, 5, 9)" in fails(capsys, *judge)
    assert "--per-image is not for a segmentation model" in fails(capsys, *judge, "--per-image", tmp_path / "t.csv")
    Image.new("L", (41, 40)).save(other / "masks" / "0.png")
    assert "has 40x41 pixels, and its image 40x40" in fails(capsys, *judge)
    grey = tmp_path / "grey"
    grey.mkdir()
    np.save(grey / "0.npy", np.zeros((40, 40, 5), np.uint8))
    with pytest.raises(UserError, match=r"no image of .* is readable: 0\.npy: has 5 channels, not 3"):
        predict(data=grey, init=segmenter, out=tmp_path / "y", num_workers=0)


def test_flips_are_turned_back(segmenter):
    """The mean over an image and its mirror image does not depend on which of them was given."""
    model, images = load_segmenter(segmenter), torch.randn(2, 3, 32, 32)
    for flips, axes in (("horizontal", (3,)), ("both", (2,)), ("both", (2, 3))):
        logits = logits_by(model, flips)
        with torch.no_grad():
            one, other = logits(images), logits(images.flip(axes))
        assert relative_error(other.flip(axes), one) < 1e-5
        assert relative_error(other, one) > 1e-2
