import pytest
import torch

from sparse_fcmae.benchmarks.scaling import scaling


def test_scaling_has_an_ideal_line(tmp_path):
    options = {"batch_size": 1, "image_size": "64", "rounds": 1}
    picture = tmp_path / "scaling.png"
    rows = scaling(over="mask-ratio", values="0,0.5", png=picture, **options)
    native = [row for row in rows if row["candidate"] == "native"]
    assert native[0]["ideal_ms"] == native[0]["ms"]
    assert native[1]["ideal_ms"] < 0.55 * native[0]["ms"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = scaling(over="image-size", values="64,64x96", **options, backend="native", mask_ratio=0.5)
    assert [row["value"] for row in rows] == ["64", "64x96"]
    assert rows[1]["ideal_ms"] == pytest.approx(1.5 * rows[0]["ms"], rel=0.03)
    before = torch.get_num_threads()
    rows = scaling(over="threads", values="1,2", **options, backend="native", mask_ratio=0.5)
    assert rows[1]["ideal_ms"] == rows[0]["ms"] / 2
    assert torch.get_num_threads() == before


def test_scaling_over_the_batch():
    one, four = scaling(over="batch-size", values="1,4", image_size="64", rounds=1, backend="native", mask_ratio=0.5)
    assert (one["batch_size"], four["batch_size"]) == (1, 4)
    assert four["ideal_ms"] == pytest.approx(4 * one["ms"])
    assert four["of_ideal"] == pytest.approx(four["ideal_ms"] / four["ms"])
    assert four["images_per_second"] == pytest.approx(4e3 / four["ms"])
