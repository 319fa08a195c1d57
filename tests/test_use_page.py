"""The commands that docs/use.md begins with, pasted into a folder of small images."""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import ConvNextV2Backbone

from sparse_fcmae.cli import main
from sparse_fcmae.demo import draw_images

PAGE = Path(__file__).parents[1] / "docs" / "use.md"
SHORTER = {  # what makes each command quick, behind what the page has
    "pretrain": "--image-size 32 --stem-stride 1 --epochs 1",
    "finetune": "--epochs 1",
    "embed": "",
    "predict": "",
    "convert": "",
}


def test_the_page_leads_from_images_to_all_that_it_promises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "LABELLED", 50, seed=0)
    for folder in ("IMAGES", "PAIRS/images", "PAIRS/masks"):
        (tmp_path / folder).mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "LABELLED").rglob("*.png"))):
        image = Image.open(path)
        image.save(tmp_path / "IMAGES" / f"{number:02}.png")
        if number < 20:
            image.save(tmp_path / "PAIRS" / "images" / f"{number:02}.png")
            bright = np.asarray(image.convert("L")) > 128
            Image.fromarray(bright.astype(np.uint8)).save(tmp_path / "PAIRS" / "masks" / f"{number:02}.png")
    block = re.search(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    for line in block.splitlines():
        _, *words = line.split()
        given = [word for word in SHORTER[words[0]].split() if word not in words or not word.startswith("--")]
        if words[0] == "finetune" and "--epochs" in words:
            words[words.index("--epochs") + 1], given = "1", []
        main([*words, *given, "--dtype", "fp32"] if words[0] != "convert" else words)
    assert np.load("features.npz")["features"].shape == (50, 320)
    assert Path("features.npz.preview.png").exists()
    assert len(Path("predictions.csv").read_text().splitlines()) == 51
    masks, images = ({path.name for path in Path(folder).glob("*.png")} for folder in ("masks", "IMAGES"))
    assert masks == images == {path.name for path in Path("overlays").glob("*.png")}
    backbone = ConvNextV2Backbone.from_pretrained("backbone")
    assert backbone.config.hidden_sizes == [40, 80, 160, 320]
