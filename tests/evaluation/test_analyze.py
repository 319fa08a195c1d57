"""Feature collapse, its measures against slow ones, and the command `analyze`."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise, relative_error
from PIL import Image

from sparse_fcmae import UserError, create_encoder
from sparse_fcmae.cli import main
from sparse_fcmae.evaluation.analyze import analyze, channel_sheet, names_of
from sparse_fcmae.evaluation.collapse import BlockStatistics, channel_distance, expanded_features, rank_me
from sparse_fcmae.weights.convert import export_model

QUICK = {"dtype": "fp32", "num_workers": 0}


def test_distance_is_the_mean_over_all_pairs():
    maps = torch.randn(3, 7, 4, 5)
    maps[1, 2] = 0
    for image, found in zip(maps, channel_distance(maps), strict=True):
        vectors = image.flatten(1)
        pairs = [(1 - F.cosine_similarity(a, b, dim=0)) / 2 for a in vectors for b in vectors]
        assert found == pytest.approx(sum(pairs).item() / len(pairs), rel=1e-5)
    same = torch.rand(1, 1, 4, 4) * torch.rand(1, 6, 1, 1)
    assert channel_distance(same).item() == pytest.approx(0, abs=1e-6)
    opposite = torch.cat([same, -same], 1)
    assert channel_distance(opposite).item() == pytest.approx(0.5)


def test_rank_of_embeddings():
    directions = torch.linalg.qr(torch.randn(30, 8)).Q
    assert rank_me(directions) == pytest.approx(8, rel=1e-4)
    assert rank_me(directions[:, :1] @ torch.randn(1, 8)) == pytest.approx(1, rel=1e-3)
    scaled = directions * torch.tensor([3.0, 1, 0, 0, 0, 0, 0, 0])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert rank_me(scaled) == pytest.approx(np.exp(entropy), rel=1e-3)
    assert rank_me(torch.zeros(4, 3)) > 0


@pytest.mark.parametrize("options", [{}, {"grn": False}, {"grn": False, "layer_scale": True}])
@pytest.mark.parametrize("backend", ["native", "torch"])
@torch.no_grad()
def test_expanded_features_are_those_of_the_forward_pass(options, backend):
    encoder = randomise(create_encoder("atto", image_size=64, **options)).eval()
    images, seen = torch.randn(2, 3, 64, 96), []
    hooks = [
        block.pwconv2.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
        for stage in encoder.stages
        for block in stage
    ]
    encoder.with_backend("masked")(images)
    for hook in hooks:
        hook.remove()
    *blocks, (last, output) = expanded_features(encoder.with_backend(backend), images)
    assert [name for name, _ in blocks] == [f"{s + 1}.{b + 1}" for s, n in enumerate((2, 2, 6, 2)) for b in range(n)]
    for (_, maps), expected in zip(blocks, seen, strict=True):
        assert relative_error(maps, expected.reshape(maps.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)) < 1e-5
    assert last == "output"
    assert relative_error(output, encoder(images)) < 1e-5


def test_constant_channels_are_counted_over_all_images():
    maps = torch.randn(6, 10, 3, 3) + 5
    maps[:, 2] = 4  # saturated
    maps[:, 3] = 0
    maps[:3, 4] = 1  # constant in some images
    maps[:, 5] *= 1e-3
    found = BlockStatistics("1.1")
    for part in maps.split(2):
        found.add(part)
    assert found.dead == pytest.approx(0.3)
    assert found.distance == pytest.approx(channel_distance(maps).mean().item(), rel=1e-5)
    nothing = BlockStatistics("1.1")
    nothing.add(torch.zeros(1, 4, 2, 2))
    assert nothing.dead == 1


@pytest.fixture
def weights(tmp_path):
    for name, grn in (("with", True), ("without", False)):
        encoder = randomise(create_encoder("atto", image_size=32, stem_stride=1, grn=grn))
        export_model(encoder, tmp_path / name / "exported")
    return [tmp_path / "with" / "exported", tmp_path / "without"]


def test_several_encoders_beside_each_other(weights, pictures, tmp_path, capsys):
    out = tmp_path / "analysis"
    flags = ["--images", "10", "--batch-size", "4", "--dtype", "fp32", "--num-workers", "0"]
    main(["analyze", "--data", str(pictures), "--init", *map(str, weights), "--out", str(out), *flags])
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "analysis.json",
        "collapse.png",
        "spectrum.png",
        "channels-1-with.png",
        "channels-2-without.png",
    }
    first, second = json.loads((out / "analysis.json").read_text())
    assert (first["images"], first["dimensions"], len(first["blocks"])) == (10, 320, 12)
    assert first["blocks"][0]["distance"] != second["blocks"][0]["distance"]
    assert f"fill {first['effective_rank']:.1f} of 320 dimensions" in said
    assert "without: the distance between channels is " in said
    again = analyze(data=pictures, init=weights[0], out=tmp_path / "again", images=10, batch_size=10, **QUICK)
    for one, other in zip(first["blocks"], again[0]["blocks"], strict=True):  # whatever the batches are
        assert one["distance"] == pytest.approx(other["distance"], rel=1e-5)
        assert one["dead"] == other["dead"]
    assert first["effective_rank"] == pytest.approx(again[0]["effective_rank"], rel=1e-5)


def test_a_sheet_of_channels_has_one_scale():
    maps = torch.zeros(70, 3, 5)
    maps[1] = 1
    maps[2, 0, 0] = 0.5
    picture = channel_sheet(maps)
    height, width = 12 * 3, 12 * 5  # each value is 12 x 12 pixels
    assert picture.shape == (8 * (height + 1), 8 * (width + 1), 3)
    assert (picture[:height, :width] == 0).all()
    assert (picture[:height, width + 1 : 2 * width + 1] == 255).all()
    third = picture[:height, 2 * width + 2 : 3 * width + 2]
    assert (third[:12, :12] == 127).all()
    assert (third[12:] == 0).all()


def test_names():
    assert names_of(["runs/a", "runs/b/exported", "runs/c/exported-ema"]) == ["a", "b", "c"]
    assert names_of(["one/a", "two/a"]) == ["one/a", "two/a"]


def test_mistakes(weights, pictures, tmp_path):
    options = {"data": pictures, "init": weights[0], "out": tmp_path / "out", **QUICK}
    with pytest.raises(UserError, match="no such file or folder"):
        analyze(**options | {"init": [weights[0], tmp_path / "nowhere"]})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: name a folder"):
        analyze(**options | {"out": tmp_path / "file"})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"no image of .* is readable"):
        analyze(**options | {"data": tmp_path / "bad"})
    Image.new("RGB", (40, 40)).save(tmp_path / "bad" / "1.png")
    (found,) = analyze(**options | {"data": tmp_path / "bad"})
    assert found["images"] == 1
    assert "0.png" in (tmp_path / "out.unreadable.txt").read_text()
    with pytest.raises(UserError, match="holds an analysis: choose another or give `overwrite=True`"):
        analyze(**options)
    with pytest.raises(UserError, match="lies among the images"):
        analyze(**options | {"out": pictures / "analysis"})
    (tmp_path / "out" / "mine.png").touch()
    analyze(**options | {"init": weights[1]}, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "channels-1-without.png",
        "collapse.png",
        "mine.png",
        "spectrum.png",
    ]
    assert not (tmp_path / "out.unreadable.txt").exists()
