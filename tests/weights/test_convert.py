"""Conversions as a whole: what is written, what the report says, and what is left alone."""

import errno
import json
import os
import sys

import pytest
import timm
import torch
from helpers import randomise
from safetensors.torch import save_file
from transformers import AutoImageProcessor

from sparse_fcmae import UserError, convert, create_fcmae, load_classifier, load_encoder
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.weights.convert import export_model
from sparse_fcmae.weights.read import read_weights
from sparse_fcmae.weights.timm import Timm


def test_round_trip_through_files_keeps_everything(tmp_path, export_classifier):
    model = export_classifier(folder="0", image_size=(64, 96))
    source = tmp_path / "0"
    for i, to in enumerate(("timm", "official", "huggingface", "official", "mmpretrain", "official"), 1):
        report = convert(source, tmp_path / str(i), to=to)
        source = tmp_path / str(i)
    assert report.count("verified") == 1
    again = load_classifier(source)
    assert not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert read_weights(tmp_path / "2").classes == ("cat", "dog", "newt")
    assert read_weights(tmp_path / "2").architecture["image_size"] == (64, 96)
    assert read_weights(tmp_path / "4").classes == ("cat", "dog", "newt")


def test_dry_run_reports_and_leaves_nothing(tmp_path, export_encoder):
    export_encoder()
    report = convert(tmp_path / "ours", tmp_path / "out", to="timm", dry_run=True)
    assert "would write" in report
    assert "result run by timm" in report
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_a_whole_models_file_and_a_pooled_encoder(tmp_path):
    model = randomise(create_fcmae("atto", image_size=64, grn_scope="batch"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", tmp_path / "timm", to="timm")
    assert "left out the decoder: pretraining alone uses it" in report
    assert "added the final norm as the identity" in report
    assert "half of the patches masked" in report
    state = load_encoder(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.encoder.state_dict().items())
    back = read_weights(tmp_path / "timm")
    assert back.state.keys() == state.keys()
    assert "left out the final norm" in back.notes[0]


@pytest.mark.parametrize("options", [{"grn": False}, {"layer_scale": True}, {"grn": False, "layer_scale": True}])
def test_blocks_for_comparison_go_where_there_is_a_place_for_them(tmp_path, export_encoder, options):
    encoder = export_encoder(**options)
    again = load_encoder(tmp_path / "ours")
    assert (again.grn, again.layer_scale) == (encoder.grn, encoder.layer_scale)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert "For comparison the blocks have" in (tmp_path / "ours" / "README.md").read_text()
    convert(tmp_path / "ours", tmp_path / "official.pth", to="official")
    assert read_weights(tmp_path / "official.pth").architecture["grn"] is encoder.grn
    assert "verified" in convert(tmp_path / "ours", tmp_path / "x.pt2", to="torch-export")
    for to, file in (("timm", "timm"), ("timm", "x.safetensors"), ("huggingface", "hf"), ("fcmae", "fcmae")):
        with pytest.raises(UserError, match=f"{to} has no blocks without GRN"):
            convert(tmp_path / "ours", tmp_path / file, to=to)
        assert not (tmp_path / file).exists()


def test_a_wrong_mapping_is_caught_and_nothing_written(tmp_path, export_encoder, monkeypatch):
    export_encoder()
    swapped = ((r"\.grn\.gamma$", ".mlp.grn.bias"), (r"\.grn\.beta$", ".mlp.grn.weight"))
    monkeypatch.setattr(Timm, "names", swapped + Timm.names)
    with pytest.raises(UserError, match="source and result differ"):
        convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_reads_back_itself_where_the_library_is_missing(tmp_path, export_encoder, monkeypatch):
    export_encoder()
    for library, to in (("timm", "timm"), ("transformers", "huggingface")):
        monkeypatch.setitem(sys.modules, library, None)
        report = convert(tmp_path / "ours", tmp_path / to, to=to)
        assert "verified: result read back by sparse-fcmae" in report
        assert f"result not run by the library: {library} is not installed" in report


def test_mistakes_leave_the_destination_untouched(tmp_path, export_encoder):
    state = export_encoder().state_dict()
    torch.save({"model": state}, tmp_path / "whole.pt")
    state["head.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "damaged.safetensors")
    for folder in ("earlier", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "earlier" / "model.pt").write_bytes(b"x")
    (tmp_path / "other" / "precious.txt").write_text("x")

    def fails(source, message, destination="new", **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=message) as error:
            convert(tmp_path / source, tmp_path / destination, **{"to": "timm", **options})
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.rglob("*")) == before

    fails("missing", "no such file or folder")
    fails("damaged.safetensors", "no head of any classes")
    fails("ours", "`to` keras: choose one of official, timm", to="keras")
    fails("ours", "would be replaced by its own conversion", destination="ours")
    fails("whole.pt", "would be replaced by its own conversion", destination="whole.pt", overwrite=True, to="official")
    fails("ours", "not empty: choose another folder or give `overwrite=True`", destination="earlier")
    fails("ours", "is there already: choose another or give `overwrite=True`", destination="whole.pt")
    fails("ours", "holds more than a conversion", destination="other", overwrite=True)
    fails("ours", "is a file: name a folder", destination="ours/config.json")
    fails(
        "ours", "`to=onnx` can't write .*: name a folder, or a file that ends in .onnx", destination="x.pt", to="onnx"
    )
    fails("ours", "`to=timm` can't write .*: name a folder, or a file that ends in .safetensors", destination="x.bin")
    (tmp_path / "folder.pt").mkdir()
    fails("ours", "is a folder: name another", destination="folder.pt")


def test_normalisation_and_size_of_the_source_are_kept(tmp_path, export_classifier):
    model = export_classifier(image_size=(64, 96))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"mean": [127.5] * 3, "std": [63.75] * 3}))
    for source, to in (("ours", "timm"), ("timm", "huggingface"), ("huggingface", "official")):
        report = convert(tmp_path / source, tmp_path / to, to=to)
        assert ("knows squares only" in report) is (to == "huggingface")
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).pretrained_cfg["mean"] == [0.5] * 3
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "huggingface").image_std) == [0.25] * 3
    weights = read_weights(tmp_path / "official")
    assert weights.form == ImageFormat("uint8", (127.5,) * 3, (63.75,) * 3)
    assert weights.classes == ("cat", "dog", "newt")
    assert "are not in such a file" in convert(tmp_path / "ours", tmp_path / "x.pt", to="official")
    assert model.image_size == (64, 96)


def test_the_images_of_the_source_are_kept_in_their_own_units(tmp_path, export_classifier):
    form = ImageFormat("uint16", (1510.5, 380.25), (300.0, 41.0), channels=(4, 2))
    export_classifier(in_chans=2, form=form)
    for source, to in (("ours", "timm"), ("timm", "huggingface"), ("huggingface", "official")):
        convert(tmp_path / source, tmp_path / to, to=to)
        assert read_weights(tmp_path / to).form == form
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    assert (config["in_chans"], config["mean"], config["std"]) == (2, [1510.5, 380.25], [300, 41])
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["mean"] == [1510.5, 380.25]
    processor = json.loads((tmp_path / "huggingface" / "preprocessor_config.json").read_text())
    assert (processor["image_std"], processor["rescale_factor"]) == ([300, 41], 1)


def test_statistics_of_another_number_of_channels_are_left_out(tmp_path, export_encoder):
    export_encoder()
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": [1.0], "std": [1.0]}))
    weights = read_weights(tmp_path / "ours")
    assert weights.form == ImageFormat.imagenet()
    assert "left out the statistics: 1 channels have one, the stem takes 3" in weights.notes


def test_configs_of_earlier_versions_have_values_between_0_and_1(tmp_path, export_encoder):
    export_encoder()
    path = tmp_path / "ours" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config | {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}))
    assert read_weights(tmp_path / "ours").known_form == ImageFormat.imagenet()


def test_headless_sources(tmp_path, export_encoder, export_classifier):
    """timm's names without its final norm; a classifier to fcmae; a head of zeros."""
    model = export_classifier()
    state = Timm().from_official(model.state_dict())
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "headless.pt")
    assert "timm does not take the source" in convert(tmp_path / "headless.pt", tmp_path / "a", to="official")
    convert(tmp_path / "ours", tmp_path / "fcmae", to="fcmae")
    assert "encoder" in json.loads((tmp_path / "fcmae" / "config.json").read_text())["format"]
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    export_model(model, tmp_path / "zero")


def test_link_to_a_folder_has_what_it_names_replaced(tmp_path, export_encoder):
    export_encoder()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(tmp_path / "ours", tmp_path / "link", to="timm")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, export_encoder, monkeypatch):
    export_encoder()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sparse_fcmae.runtime.files.torch.save", lambda value, file: file.write(b"x"))
    monkeypatch.setattr("sparse_fcmae.runtime.files.Noting.write", full)
    for name in ("x.pt", "folder"):
        with pytest.raises(UserError, match=r"can't write .*: No space left on device"):
            convert(tmp_path / "ours", tmp_path / name, to="mmpretrain")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_overwrite_replaces_an_earlier_conversion(tmp_path, export_encoder):
    export_encoder()
    convert(tmp_path / "ours", tmp_path / "out", to="huggingface")
    convert(tmp_path / "ours", tmp_path / "out", to="timm", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "convnextv2_atto"
    for _ in range(2):
        convert(tmp_path / "ours", tmp_path / "one.safetensors", to="timm", overwrite=True)
    assert not list(tmp_path.glob(".*"))
