import csv
import inspect
import json
import re
import sys
from functools import wraps
from html.parser import HTMLParser
from importlib.resources import files

import pytest
import torch

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks import report as module
from sparse_fcmae.benchmarks.config import ReportConfig
from sparse_fcmae.benchmarks.report import SECTIONS
from sparse_fcmae.cli import main

PLOTS = {"gflops.png", "throughput.png", "limit.png", "memory.png", "scaling-mask-ratio.png"}


@pytest.fixture
def small_report(monkeypatch):
    """The report on what is measured in seconds."""

    @wraps(SECTIONS["compare"].benchmark)
    def absent():
        raise UserError("<timm> is not there & so on")

    small = {"batch_size": 1, "image_size": "64", "rounds": 1}
    runs = {
        "gflops": [{"model": "atto,tiny", "image_size": "224"}],
        "throughput": [small | {"mask_ratio": "0.5", "backend": "native,masked"}],
        "mask ratio": [small | {"values": "0,0.5"}],
        "compare": [{}],
    }
    monkeypatch.setattr(module, "plan", lambda *_: {name: runs.get(name, []) for name in SECTIONS})
    monkeypatch.setitem(SECTIONS, "compare", SECTIONS["compare"]._replace(benchmark=absent))


def test_report_is_one_page_with_plots_and_rows(small_report, tmp_path):
    out = tmp_path / "bench"
    main(["bench", "report", "--out", str(out), "--model", "atto"])
    page = (out / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 5
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", page.replace("xlink:href", ""))
    assert "<li>&lt;timm&gt; is not there &amp; so on</li>" in page
    assert "over dense convolution with a mask, atto, fp32" in page
    parser = HTMLParser()
    parser.feed(page)
    parser.close()
    assert {path.name for path in out.iterdir()} == {"report.html", "rows.json", "rows.csv", *PLOTS}
    rows = json.loads((out / "rows.json").read_text())
    assert set(rows["sections"]) == set(SECTIONS)
    assert rows["sections"]["compare"] == [{"refused": "<timm> is not there & so on"}]
    assert rows["environment"]["command"] == "sparse-fcmae bench report --model atto"
    with (out / "rows.csv").open() as file:
        assert {row["benchmark"] for row in csv.DictReader(file)} == {"gflops", "throughput", "mask ratio", "compare"}


def test_a_page_can_be_made_again_from_the_saved_rows(small_report, tmp_path):
    out, again = tmp_path / "bench", tmp_path / "again"
    module.report(out=out, model="atto")
    again.mkdir()
    module.make_page(json.loads((out / "rows.json").read_text()), again)
    assert (again / "report.html").read_text() == (out / "report.html").read_text()
    assert (again / "rows.csv").read_text() == (out / "rows.csv").read_text()
    assert {path.name for path in again.iterdir()} == {"report.html", "rows.csv", *PLOTS}


def test_parts_of_a_run_are_in_its_table(tmp_path):
    """Those of a model are left out, of the counts alone."""
    setting = {"device": "cpu", "cpu": "Fast", "date": "2026-01-01"}
    row = {"model": "atto", "dtype": "fp32", "batch_size": 8, "part": "ideal", "images_per_second": 12345.6}
    module.make_page({"environment": setting, "sections": {"pretrain": [row]}}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") == 1
    assert ">12345.6</td>" in page


def test_every_section_has_options_that_its_benchmark_takes_and_a_place_on_the_page():
    runs = module.plan(ReportConfig(), ["atto", "tiny"], torch.device("cpu"))
    assert set(runs) == set(SECTIONS)
    template = files("sparse_fcmae.benchmarks").joinpath("report.html").read_text()
    for name, section in SECTIONS.items():
        for options in runs[name]:
            inspect.signature(section.benchmark).bind(**options)
        assert f"${name.replace(' ', '_')}\n" in template
        assert f'<h2 id="{name.replace(" ", "-")}">' in template


@pytest.mark.parametrize("fast", [True, False])
def test_report_measures_bfloat16_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(module, "choose_dtype", lambda *_: torch.bfloat16 if fast else torch.float32)
    cpu = torch.device("cpu")
    (options,) = module.plan(ReportConfig(model="atto"), ["atto"], cpu)["throughput"]
    assert options["dtype"] == ("fp32,bf16" if fast else "fp32")
    assert options["batch_size"] == 32
    assert any(row.get("dtype") == "bf16" and row["refused"] for row in module.not_measured(cpu)) is not fast


def test_report_replaces_reports_alone(capsys, small_report, tmp_path):
    out = tmp_path / "bench"
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    def refuses(flags, message):
        with pytest.raises(SystemExit) as stop:
            main(["bench", "report", "--out", str(out), *flags])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

    refuses([], "holds no report")
    refuses(["--overwrite"], "holds no report")
    assert [path.name for path in tmp_path.rglob("*")] == ["bench", "mine.txt"]
    (out / "report.html").write_text("an earlier one")
    refuses([], "give --overwrite")
    refuses(["--overwrite"], "holds more than a report (mine.txt)")
    (out / "mine.txt").unlink()
    main(["bench", "report", "--out", str(out), "--overwrite"])
    assert "<svg" in (out / "report.html").read_text()


def test_what_was_measured_before_a_failure_is_kept(capsys):
    def benchmark(model):
        if model == "tiny":
            raise RuntimeError("torn\nin two")
        if model == "huge":
            raise UserError("it is too large")
        return [{"model": model, "ms": 1.0}]

    rows = module.measured(benchmark, [{"model": name} for name in ("atto", "tiny", "huge", "base")])
    assert rows == [
        {"model": "atto", "ms": 1.0},
        {"model": "tiny", "refused": "RuntimeError: torn in two"},
        {"model": "huge", "refused": "it is too large"},
        {"model": "base", "ms": 1.0},
    ]
    assert capsys.readouterr().err.count("Traceback") == 1


def test_an_interrupted_report_leaves_the_earlier_one(monkeypatch, small_report, tmp_path):
    out = tmp_path / "bench"
    out.mkdir()
    (out / "report.html").write_text("an earlier one")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measured", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "report", "--out", str(out), "--overwrite"])
    assert stop.value.code == 130
    assert [path.name for path in tmp_path.rglob("*")] == ["bench", "report.html"]


def test_pictures_need_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["report", "--out", str(tmp_path / "x")], ["scaling", "--png", str(tmp_path / "x.png")]):
        with pytest.raises(SystemExit):
            main(["bench", *command])
        assert "pip install 'sparse-fcmae[plots]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
