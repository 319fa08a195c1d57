"""Images that are others than before under the same names."""

import torch
from PIL import Image

from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.sources import contents
from sparse_fcmae.data.sources.contents import LOOKED_AT, contents_of, other_contents
from sparse_fcmae.data.sources.opening import open_images


def test_images_that_were_swapped_are_noticed(tmp_path):
    for number in range(40):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number:02d}.png")
    source = open_images(tmp_path, None, SourceConfig())
    before = contents_of(source)
    assert len(before) == LOOKED_AT
    assert {"00.png", "39.png"} <= before.keys()
    assert other_contents(before, contents_of(source)) == []
    Image.new("L", (8, 8), 99).save(tmp_path / "00.png")
    (line,) = other_contents(before, contents_of(source))
    assert line.startswith("of 16 images looked at, 1 have other contents than when the run began, such as 00.png: ")
    assert other_contents({}, contents_of(source)) == []  # a run of an earlier version


def test_of_a_large_file_the_ends_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "END_BYTES", 100)
    noise = torch.randint(256, (20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    Image.fromarray(noise).save(tmp_path / "a.png")
    source, path = open_images(tmp_path, None, SourceConfig()), tmp_path / "a.png"
    before, content = contents_of(source), path.read_bytes()
    assert len(content) > 1000
    for place in (0, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert contents_of(source) != before
    path.write_bytes(content[:500] + content[501:])
    assert contents_of(source) != before
    path.write_bytes(content)
    assert contents_of(source) == before


def test_what_can_t_be_read_is_no_reason_to_stop(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    assert list(contents_of(open_images(tmp_path, None, SourceConfig()))) == ["a.png"]
