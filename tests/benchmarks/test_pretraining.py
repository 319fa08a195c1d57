import json

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks.pretraining import pretraining
from sparse_fcmae.cli import main


def test_a_run_is_measured_beside_its_step_and_decoding(pictures, tmp_path, capsys):
    flags = "--image-size 64 --mask-ratio 0.5 --batch-size 4 --rounds 1 --steps 3 --json"
    main(["bench", "pretrain", "--data", str(pictures), *flags.split(), str(tmp_path / "rows.json")])
    rows = {row["part"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert list(rows) == ["decoding", "step", "ideal", "pretrain"]
    cores = rows["step"]["cores"]
    assert rows["decoding"]["cores"] == 1
    assert rows["ideal"]["ms"] == pytest.approx(rows["step"]["ms"] + rows["decoding"]["ms"] / cores)
    assert rows["pretrain"]["of_ideal"] == pytest.approx(rows["ideal"]["ms"] / rows["pretrain"]["ms"])
    assert 0 <= rows["pretrain"]["data_wait"] < 1
    assert "loss" not in capsys.readouterr().out


def test_images_that_can_not_be_read_are_one_line(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 8 images looked at can be read"):
        pretraining(data=str(tmp_path), image_size="64", batch_size=4, rounds=1, steps=3)
