"""What a page shows of a run, and the file that it is."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up import CHECKPOINTS, NAME, made_run, tile
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.cli import main
from sparse_fcmae.report.page import in_page, record_of
from sparse_fcmae.report.record import LARGE, PICTURES, RunReader, compressed
from sparse_fcmae.report.report import report


def read(folder):
    return RunReader(folder, in_page).read()


def record_in(page):
    """What a page shows, as its script would read it."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="record" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_a_record_has_what_the_run_measured(run):
    found = read(run)
    facts = dict(found["facts"])
    assert facts["step"] == "12 of 12"
    assert facts["loss"] == "0.0833"
    assert facts["k-NN top-1"] == "12.00 %"
    assert facts["held-out loss"] == "0.1538"
    assert facts["unreadable images"] == "1"
    assert "steps skipped, as not finite" not in facts
    charts = {chart["name"]: chart for chart in found["charts"]}
    measured = ["loss", "knn_top1", "effective_rank", "channel_distance", "distances"]
    assert list(charts) == [*measured, "lr", "grad_norm", "images_per_second", "data_wait", "memory_gb"]
    assert [line["label"] for line in charts["distances"]["lines"]] == ["block 1.1", "block 3.2"]
    assert facts["effective rank"] == "52"
    assert [line["label"] for line in charts["loss"]["lines"]] == ["steps", "held-out images"]
    assert charts["loss"]["lines"][0]["value"][1] == 0.5
    assert charts["knn_top1"]["lines"][0]["value"] == [0, 4, 8, 12]
    assert [line["dashed"] for line in charts["knn_top1"]["lines"]] == [False, True]
    assert charts["data_wait"]["lines"][0]["value"] == [25.0] * 12
    assert found["unreadable"] == {"count": 1, "named": [(NAME, "cut off")]}
    assert found["options"]["--lr"] == 1e-3
    assert "--images" not in found["options"]
    assert found["images"]["channels"] == [1, 4]
    (exported,) = found["exported"]
    assert exported["code"] == f'load_encoder("{run / "exported"}")\n'
    assert ("model.safetensors", 2_500_000) in exported["files"]
    assert found["notes"] == []
    assert found["verdict"] == {"state": "too early to say", "reason": "12 steps are too few"}
    assert (found["evaluation"], found["analysis"]) == (None, None)


def test_tiles_are_where_the_pictures_have_them(run):
    found = read(run)["reconstructions"]
    assert [part["step"] for part in found["steps"]] == list(CHECKPOINTS)
    for part in found["steps"]:
        kind, _, data = part["source"].partition(";base64,")
        assert kind == "data:image/png"
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for row, tiles in enumerate(found["tiles"]):
            for column, (left, top, width, height) in enumerate(tiles):
                assert (height, width) == (64, 128)
                assert (picture[top : top + height, left : left + width] == tile(part["step"], column, row)).all()


def test_of_many_pictures_some_are_shown(run):
    for path in (run / "reconstructions").glob("*.png"):
        data = path.read_bytes()
    for step in range(1, 101):
        (run / "reconstructions" / f"step-{step:08d}.png").write_bytes(data)
    found = read(run)["reconstructions"]
    steps = [part["step"] for part in found["steps"]]
    assert (len(steps), steps[0], steps[-1], found["of"]) == (PICTURES, 1, 100, 100)
    assert set(np.diff(steps)) <= {4, 5}


def test_pictures_of_another_layout_are_named(run):
    for path in (run / "reconstructions").glob("*.png"):
        Image.new("RGB", (300, 200)).save(path)
    found = read(run)
    assert found["reconstructions"] is None
    assert found["notes"] == ["3 of 3 pictures of reconstructions have another layout, and are not shown"]


def test_pictures_of_an_earlier_layout_are_left_out_and_counted(run):
    Image.new("RGB", (300, 200)).save(run / "reconstructions" / "step-00000001.png")
    found = read(run)
    assert [part["step"] for part in found["reconstructions"]["steps"]] == list(CHECKPOINTS)
    assert found["notes"] == ["1 of 4 pictures of reconstructions have another layout, and are not shown"]


def test_a_name_that_is_no_text_is_shown_somehow(tmp_path):
    folder = made_run(tmp_path / "caf\udce9")
    main(["report", str(folder), "--out", str(tmp_path / "page.html")])
    assert b"caf\\udce9" in (tmp_path / "page.html").read_bytes()


def test_large_pictures_are_packed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.new("RGB", (400, 400)).save(tmp_path / "plain.png")
    data, kind = compressed(tmp_path / "noise.png")
    assert kind == "image/jpeg"
    assert len(data) < (tmp_path / "noise.png").stat().st_size > LARGE
    assert Image.open(io.BytesIO(data)).size == (400, 400)
    assert compressed(tmp_path / "plain.png")[1] == "image/png"


def test_a_run_that_has_just_begun_has_a_page(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"format": "sparse-fcmae fine-tuning run", "epochs": 3}')
    main(["report", str(tmp_path / "run")])
    assert capsys.readouterr().out == f"report: {tmp_path / 'run' / 'report.html'}\n"
    (found,) = record_in(tmp_path / "run" / "report.html")["runs"]
    assert (found["charts"], found["reconstructions"], found["log"]) == ([], None, [])


def test_the_page_needs_nothing_else_and_its_names_are_harmless(evaluated, tmp_path):
    other = made_run(tmp_path / "other", steps=2000, lr=3e-3)
    page = tmp_path / "page.html"
    main(["report", str(evaluated), str(other), "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    parser = HTMLParser()
    parser.feed(text)
    parser.close()
    assert text.count("<script") == text.count("</script>") == 2
    assert "alert(1)</script>" not in text
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", text)
    ids = re.findall(r'\bid="([^"$]+)"', text)
    assert len(ids) == len(set(ids))
    found = record_in(page)
    assert [run["name"] for run in found["runs"]] == ["run", "other"]
    assert found["runs"][0]["evaluation"]["confusion"]["classes"][0] == NAME
    assert found["runs"][0]["evaluation"]["confusion"]["counts"] == [[0, 0, 9], [0, 1, 1], [1, 0, 3], [1, 1, 7]]
    assert found["live"] is False


def test_the_page_is_renewed_and_nothing_else_replaced(run, capsys):
    main(["report", str(run)])
    main(["report", str(run)])
    (run / "notes.html").write_text("<!doctype html>\n<p>mine</p>")
    for out, message in (("notes.html", "no page of a run"), ("reconstructions", "it is a folder")):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(run), "--out", str(run / out)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert (run / "notes.html").read_text() == "<!doctype html>\n<p>mine</p>"


def test_runs_are_named_by_any_path(run, tmp_path):
    assert report(runs=run) == f"report: {run / 'report.html'}"
    assert report(runs=(run,), out=tmp_path / "page.html") == f"report: {tmp_path / 'page.html'}"


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(UserError, match="no run in this folder"):
        report(runs=str(tmp_path))
    with pytest.raises(UserError, match="twice"):
        report(runs=[str(run), str(run)])
    with pytest.raises(UserError, match="`runs` is missing"):
        report(runs=[])


def test_runs_of_one_name_are_called_by_their_paths(tmp_path):
    folders = [made_run(tmp_path / name / "run") for name in "ab"]
    found = record_of([RunReader(folder, in_page) for folder in folders])
    assert [run["name"] for run in found["runs"]] == list(map(str, folders))


def test_overwriting_a_run_takes_its_page_along(pictures, tmp_path):
    run = tmp_path / "run"
    tiny = ["--data", str(pictures), "--out", str(run), "--image-size", "32", "--stem-stride", "1", "--max-steps", "2"]
    tiny += ["--batch-size", "4", "--decoder-dim", "32", "--num-workers", "0"]
    main(["pretrain", *tiny])
    main(["report", str(run)])
    (found,) = record_in(run / "report.html")["runs"]
    assert dict(found["facts"])["state"] == "finished"
    assert [part["step"] for part in found["reconstructions"]["steps"]] == [2]
    assert found["exported"][0]["code"].startswith("from sparse_fcmae import load_encoder")
    main(["pretrain", *tiny, "--overwrite"])
    assert not (run / "report.html").exists()
