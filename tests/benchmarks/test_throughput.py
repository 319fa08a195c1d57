import copy
import csv
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_fcmae import UserError, available_backends
from sparse_fcmae.backends import BACKENDS, NativeLayout
from sparse_fcmae.benchmarks import candidates, compare, report, results, steps, throughput, timing
from sparse_fcmae.benchmarks.gflops import gflops
from sparse_fcmae.benchmarks.kernels import kernels
from sparse_fcmae.benchmarks.scaling import scaling
from sparse_fcmae.benchmarks.throughput import PEERS
from sparse_fcmae.cli import main
from sparse_fcmae.config import OutputConfig, ReportConfig, ThroughputConfig
from sparse_fcmae.fcmae import FCMAE
from sparse_fcmae.flops import count, macs, stage_products

USABLE = [name for name, reason in available_backends("cpu").items() if reason is None]
SMALL = {"batch_size": "2", "image_size": "64", "rounds": 1, "mask_ratio": "0.5"}
FLAGS = ["--batch-size", "2", "--image-size", "64", "--rounds", "1", "--mask-ratio", "0.5"]


def by_candidate(rows):
    return {row["candidate"]: row for row in rows if row["candidate"] not in PEERS}


def test_throughput_reports_every_backend(capsys, tmp_path):
    main(["bench", "throughput", *FLAGS, "--work", "step", "--json", str(tmp_path / "rows.json")])
    result = json.loads((tmp_path / "rows.json").read_text())
    rows = by_candidate(result["rows"])
    assert set(rows) == {*USABLE, "matrix products"} | {n for n in BACKENDS if n not in USABLE}
    assert rows["masked"]["speedup"] == 1
    assert 0 < rows["native"]["kept_mb"] < rows["torch"]["kept_mb"] < rows["masked"]["kept_mb"]
    assert rows["native"]["p20_ms"] <= rows["native"]["ms"] <= rows["native"]["p80_ms"]
    assert rows["native"]["forward_error"] < 1e-5
    assert all(rows[name]["over_limit"] > 0 and rows[name]["peak_mb"] > 0 for name in USABLE)
    assert {row["candidate"] for row in result["rows"] if row.get("refused")} >= set(PEERS)
    assert result["environment"]["threads"] == torch.get_num_threads()
    flags = "--batch-size 2 --image-size 64 --mask-ratio 0.5 --work step --rounds 1"
    assert result["environment"]["command"] == f"sparse-fcmae bench throughput {flags}"
    assert "images/s" in capsys.readouterr().out


def test_throughput_of_a_grid_of_settings():
    lists = {"batch_size": "1,2", "mask_ratio": "0.25,0.5", "dtype": "fp32,bf16"}
    rows = throughput.throughput(**SMALL | lists, backend="native")
    settings = {(r["mask_ratio"], r["dtype"], r["batch_size"], r["work"], r["candidate"]) for r in rows}
    assert len(settings) == len(rows) == 2 * 2 * 2 * 3 * 2
    assert not [row for row in rows if "refused" in row]
    halved = [r for r in rows if (r["dtype"], r["candidate"]) == ("bf16", "native") and r["work"] != "pretrain"]
    assert all(1e-4 < row["forward_error"] < 0.05 for row in halved)


def test_throughput_without_a_mask():
    rows = throughput.throughput(**SMALL | {"mask_ratio": 0}, work="forward,step", backend="native,torch,masked")
    assert not [row for row in rows if "refused" in row]


def test_throughput_refuses_a_backend_that_is_wrong(monkeypatch):
    leave = NativeLayout.leave
    monkeypatch.setattr(NativeLayout, "leave", lambda self, x: leave(self, x) * 1.01)
    rows = by_candidate(throughput.throughput(**SMALL, work="step", backend="native,torch,masked"))
    assert rows["native"]["refused"] == "features or gradients differ"
    assert "ms" not in rows["native"]
    assert "refused" not in rows["torch"]


def test_throughput_refuses_a_decoder_that_is_wrong(monkeypatch):
    decode = FCMAE.decode

    def wrong(self, *arguments):
        return decode(self, *arguments) * (1.01 if self.encoder.backend == "native" else 1)

    monkeypatch.setattr(FCMAE, "decode", wrong)
    rows = by_candidate(throughput.throughput(**SMALL, work="pretrain", backend="native,masked"))
    assert rows["native"]["refused"] == "loss or gradients differ"
    assert rows["masked"]["ms"] > 0


@pytest.mark.parametrize("work", ["forward", "step"])
def test_throughput_refuses_a_variant_that_is_wrong(monkeypatch, work):
    def wrong(encoder):
        half = copy.deepcopy(encoder)
        with torch.no_grad():
            half.downsample_layers[0][0].weight *= 0.5
        return half

    options = SMALL | {"work": work, "backend": "native", "compiled": True}
    monkeypatch.setattr(steps, "compile_whole", wrong)
    assert by_candidate(throughput.throughput(**options))["native, compiled"]["refused"] == "what it computes differs"
    monkeypatch.setattr(steps, "compile_whole", copy.deepcopy)
    assert by_candidate(throughput.throughput(**options))["native, compiled"]["ms"] > 0


def test_the_largest_batch_is_searched(monkeypatch):
    monkeypatch.setattr(throughput, "MAX_BATCH", 4)
    rows = by_candidate(throughput.throughput(**SMALL | {"batch_size": "max"}, work="step", backend="native"))
    assert rows["native"]["batch_size"] == 4
    assert rows["native"]["kept_mb"] > 0


def test_inputs_that_do_not_fit_are_a_row_too(monkeypatch):
    monkeypatch.setattr(throughput, "GATE_BATCH", 1)
    options = {"batch_size": "16384", "image_size": "1024", "mask_ratio": "0.95", "rounds": 1}
    rows = by_candidate(throughput.throughput(**options, work="step", backend="native"))
    assert rows["native"]["refused"] == "out of memory"


def test_what_does_not_fit_into_memory_is_said_and_the_rest_goes_on(monkeypatch):
    stem = NativeLayout.stem

    def hungry(self, images, *layers):
        if len(images) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return stem(self, images, *layers)

    monkeypatch.setattr(NativeLayout, "stem", hungry)
    monkeypatch.setattr(throughput, "GATE_BATCH", 1)
    monkeypatch.setattr(throughput, "MAX_BATCH", 4)
    rows = throughput.throughput(**SMALL | {"batch_size": "3,max"}, work="forward", backend="native,masked")
    found = {(row["candidate"], row["batch_size"]): row.get("refused") for row in rows}
    assert found[("native", 3)] == "out of memory"
    assert found[("masked", 3)] is None
    assert found[("native", 1)] is found[("masked", 4)] is None


def test_largest_batches_are_halved_until_all_fit_beside_each_other(monkeypatch):
    def crowded(runs, *_, **__):
        sizes.append({name: run.args[2].shape[0] for name, run in runs.items() if name in ("native", "masked")})
        if len(sizes) < 3:
            raise MemoryError
        return {name: [1.0] for name in runs}

    sizes = []
    monkeypatch.setattr(throughput, "take_turns", crowded)
    monkeypatch.setattr(throughput, "largest_batch", lambda case, work, name: {"native": 6, "masked": 1}[name])
    rows = throughput.throughput(**SMALL | {"batch_size": "max"}, work="forward", backend="native,masked")
    assert sizes == [{"native": size, "masked": 1} for size in (6, 3, 1)]
    assert [row["images_per_second"] for row in rows] == [1, 1, 1]


def test_memory_is_refused_not_promised():
    with timing.failing_beyond_memory():
        assert timing.within_memory(lambda: torch.zeros(1 << 42)) is None
        assert timing.within_memory(lambda: torch.zeros(8).sum().item()) == 0
    with pytest.raises(RuntimeError, match="shape"):
        timing.within_memory(lambda: torch.zeros(2).view(3))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's account")
def test_peak_memory():
    found = timing.peak_megabytes(lambda: [torch.ones(20_000_000) for _ in range(3)], torch.device("cpu"))
    assert found == pytest.approx(240, rel=0.2)


def test_matrix_products_are_those_of_a_step():
    case = steps.Case("atto", (64, 64), 0.5, 3, False, torch.device("cpu"))
    found = {}
    for work in steps.WORKS:
        run = steps.matrix_products(case, work)
        with FlopCounterMode(display=False) as counter:
            run()
        found[work] = counter.get_total_flops() / 2
    assert found["forward"] == 3 * sum(macs(stage_products("atto", stage), 2) for stage in range(4))
    stem = macs(stage_products("atto", 0)[:1], 2)
    assert found["step"] == 3 * (found["forward"] - stem)
    decoder = count("atto", image_size=(64, 64))["decoder"].dense - 49 * 4 * 512
    assert found["pretrain"] == found["step"] + 3 * 3 * decoder


def test_rows_are_appended_with_what_they_depend_on(tmp_path):
    path = tmp_path / "rows.csv"
    for model in ("atto", "tiny"):
        gflops(model=model, image_size="224", csv=str(path))
    gflops(model="atto", image_size="224", mask_ratio="0", csv=str(path))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["model"] for r in rows if r["part"] == "whole"] == ["atto", "tiny", "atto"]
    assert all(r["benchmark"] == "gflops" and r["torch"] == torch.__version__ and r["commit"] for r in rows)
    assert rows[-1]["command"] == "sparse-fcmae bench gflops --model atto --image-size 224 --mask-ratio 0"


def test_new_columns_join_those_of_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    results.append_csv(path, {"benchmark": "one", "environment": {"torch": "2"}, "rows": [{"a": 1}]})
    results.append_csv(path, {"benchmark": "two", "environment": {"torch": "2"}, "rows": [{"b": 2}]})
    assert path.read_text().splitlines() == ["benchmark,a,torch,b", "one,1,2,", "two,,2,2"]


def test_a_command_is_quoted_and_leaves_outputs_out():
    config = ThroughputConfig(model="atto,tiny", compiled=True, json="/somewhere/rows.json")
    assert results.command("throughput", config) == "sparse-fcmae bench throughput --model atto,tiny --compiled"


@pytest.mark.parametrize("name", ["json", "csv"])
@pytest.mark.parametrize("place", ["no/rows", ".", "notes.txt"])
def test_outputs_that_cannot_be_written(tmp_path, name, place):
    (tmp_path / "notes.txt").write_text("mine")
    if (name, place) == ("json", "notes.txt"):
        return
    with pytest.raises(UserError, match=r"can't write|appended to a file of a benchmark's"):
        results.check(OutputConfig(**{name: str(tmp_path / place)}))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_json_to_the_standard_output(capsys):
    main(["bench", "gflops", "--model", "huge", "--image-size", "512", "--json", "-"])
    output = capsys.readouterr()
    row = json.loads(output.out)["rows"][0]
    assert 600.4 <= row["dense_gmacs"] <= 600.8
    assert round(row["parameters_millions"], 1) == 660.3
    assert "G dense" in output.err


def test_table_leaves_out_empty_columns_and_tells_reasons():
    columns = {"name": ("name", ""), "ms": ("ms", ".1f"), "never": ("never", "g")}
    rows = [{"name": "a", "ms": 1.25}, {"name": "long", "refused": "why"}]
    assert results.format_table(rows, columns).splitlines() == ["name   ms", "a     1.2", "long       why"]


def test_scaling_has_an_ideal_line(tmp_path):
    options = {"batch_size": 1, "image_size": "64", "rounds": 1}
    picture = tmp_path / "scaling.png"
    rows = scaling(over="mask-ratio", values="0,0.5", png=str(picture), **options)
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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("throughput --backend fast", "unknown backend 'fast'"),
        ("throughput --model atto,giga", "unknown model 'giga'"),
        ("throughput --work step,nothing", "unknown work 'nothing'"),
        ("throughput --dtype fp8", "unknown dtype 'fp8'"),
        ("throughput --batch-size 0", "--batch-size must be from 1 to 16384, or max, not 0"),
        ("throughput --batch-size 99999999999999999999", "--batch-size must be from 1 to 16384, or max"),
        ("throughput --seed -1", "--seed must be 0 or more"),
        ("throughput --seed 99999999999999999999999", "--seed must be 0 or more"),
        ("throughput --json same.rows --csv same.rows", "--json and --csv can't be the same file"),
        ("compare --batch-size 99999999999999999999", "--batch-size must be at most"),
        ("kernels --rounds 0", "--rounds must be greater than 0"),
        ("report --seed -1", "--seed must be 0 or more"),
        ("report --data /nowhere", "--data /nowhere: no such folder"),
        ("scaling --over threads --values 100000", "threads at most"),
        ("scaling --over model --values giga", "unknown model 'giga'"),
        ("throughput --batch-size many", "--batch-size many: give numbers"),
        ("throughput --mask-ratio 1.5", "mask ratio 1.5 is not a share"),
        ("throughput --mask-ratio 0", "pretraining needs masks"),
        ("throughput --image-size 100", "not a multiple of the 32-pixel patch"),
        ("throughput --rounds 0", "--rounds must be greater than 0"),
        ("throughput --json /nowhere/rows.json", "can't write /nowhere/rows.json"),
        ("throughput --device tpu", "--device tpu can't be used"),
        ("throughput --backends native", "unknown arguments: --backends native"),
        ("throughput --backend minkowski --dtype bf16", "MinkowskiEngine"),
        ("scaling --backend minkowski --dtype bf16", "MinkowskiEngine"),
        ("data", "--data is missing"),
        ("scaling --over time", "invalid choice: 'time'"),
        ("scaling --over threads --values 0", "--values must be from 1"),
        ("scaling --values 0.5,0.99", "keeps no patch"),
        ("scaling --png /nowhere/x.png", "can't write /nowhere/x.png"),
        ("kernels --model nano2", "unknown model 'nano2'"),
        ("gflops --compare mvit", "give timm:NAME@PIXELS"),
        ("gflops --compare timm:nonsense@224", "Unknown model"),
        ("report --model giga", "unknown model 'giga'"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, command, message):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *command.split()])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.fixture
def small_report(monkeypatch):
    """The report on what is measured in seconds."""
    every = report.sections

    def some(*arguments):
        small = {"batch_size": 1, "image_size": "64", "rounds": 1}
        measures = {
            "gflops": lambda: gflops(model="atto,tiny", image_size="224"),
            "throughput": lambda: throughput.throughput(**small, mask_ratio="0.5", backend="native,masked"),
            "mask ratio": lambda: scaling(**small, values="0,0.5"),
            "kernels": lambda: [],
            "compare": lambda: (_ for _ in ()).throw(UserError("<timm> is not there & so on")),
        }
        parts = [part for part in every(*arguments) if part.name in measures]
        for part in parts:
            part.measure = measures[part.name]
        return parts

    monkeypatch.setattr(report, "sections", some)


def test_report_is_one_page_with_plots_and_rows(small_report, tmp_path):
    out = tmp_path / "bench"
    main(["bench", "report", "--out", str(out), "--model", "atto"])
    page = (out / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 4
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", page.replace("xlink:href", ""))
    assert "<li>&lt;timm&gt; is not there &amp; so on</li>" in page
    assert "over dense convolution with a mask, atto, fp32" in page
    parser = HTMLParser()
    parser.feed(page)
    parser.close()
    names = {"report.html", "rows.json", "rows.csv", "gflops.png", "throughput.png", "memory.png"}
    assert {path.name for path in out.iterdir()} == names | {"scaling-mask-ratio.png"}
    rows = json.loads((out / "rows.json").read_text())
    assert rows["sections"]["compare"] == [{"refused": "<timm> is not there & so on"}]
    assert rows["environment"]["command"] == "sparse-fcmae bench report --model atto"
    with (out / "rows.csv").open() as file:
        assert {row["benchmark"] for row in csv.DictReader(file)} == {"gflops", "throughput", "mask ratio", "compare"}


@pytest.mark.parametrize("fast", [True, False])
def test_report_measures_bfloat16_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(report, "choose_dtype", lambda *_: torch.bfloat16 if fast else torch.float32)
    monkeypatch.setattr(report.throughput, "throughput", lambda **options: [{"dtypes": options["dtype"]}])
    config = ReportConfig(model="atto")
    backends = next(s for s in report.sections(config, ["atto"], torch.device("cpu")) if s.name == "throughput")
    rows = backends.measure()
    assert rows[0] == {"dtypes": "fp32,bf16" if fast else "fp32"}
    assert any(row.get("dtype") == "bf16" and row["refused"] for row in rows) is not fast


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
    main(["bench", "report", "--out", str(out), "--overwrite"])
    assert "<svg" in (out / "report.html").read_text()


def test_an_interrupted_report_leaves_the_earlier_one(monkeypatch, small_report, tmp_path):
    out = tmp_path / "bench"
    out.mkdir()
    (out / "report.html").write_text("an earlier one")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "measured", interrupt)
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


def test_kernels_gates_and_writes_rows(capsys, tmp_path):
    options = ["--batch-size", "1", "--image-size", "64x96", "--mask-ratio", "0.5", "--rounds", "1"]
    for dtype in ("fp32", "bf16"):
        main(["bench", "kernels", *options, "--dtype", dtype, "--json", str(tmp_path / "rows.json"), "--device", "cpu"])
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert len(rows) == 4 * 4 * 2
        assert all(row["of_bound"] > 0 and row["over_reference"] > 0 for row in rows)
    assert "refused" not in capsys.readouterr().out


def test_kernels_refuses_wrong_results(monkeypatch):
    from sparse_fcmae.ops import reference

    exact = reference.gelu_grn
    monkeypatch.setattr(reference, "gelu_grn", lambda *arguments: 1.01 * exact(*arguments))
    rows = kernels(batch_size=1, image_size="64", mask_ratio=0.5, rounds=1, device="cpu")
    assert {row["op"] for row in rows if "refused" in row} == {"gelu_grn", "convnext_block"}


def test_profile_names_kernels_and_matrix_products(capsys, tmp_path):
    options = ["--batch-size", "2", "--image-size", "64", "--mask-ratio", "0", "--rounds", "1", "--dtype", "bf16"]
    main(["bench", "profile", *options, "--json", str(tmp_path / "profile.json")])
    rows = {row["what"]: row for row in json.loads((tmp_path / "profile.json").read_text())["rows"]}
    assert rows["matrix products"]["bytes"] > 0
    assert rows["kernel gelu_grn_backward"]["calls"] == 12
    assert "MB moved" in capsys.readouterr().out


def test_compare_gates_and_writes_rows(capsys, monkeypatch, tmp_path):
    options = ["--batch-size", "2", "--image-size", "64", "--rounds", "1", "--drop-path", "0.1"]
    monkeypatch.setitem(sys.modules, "transformers", None)

    def wrong(*_):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1000))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def full_in_training(*given):
        model = candidates.from_timm(*given)
        model.register_forward_pre_hook(lambda model, _: full() if model.training else None)
        return model

    more = {make.__name__: (make, torch.channels_last) for make in (wrong, full, full_in_training)}
    monkeypatch.setattr(candidates, "CONVNEXTS", candidates.CONVNEXTS | more)
    monkeypatch.setitem(candidates.MVITS, "atto", "mvitv2_tiny")
    main(["bench", "compare", *options, "--json", str(tmp_path / "rows.json")])
    rows = {row["candidate"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["sparse-fcmae"]["ours_over_it"] == 1
    assert rows["timm, channels last"]["ours_over_it"] > 0
    assert rows["timm"]["gmacs"] == pytest.approx(rows["sparse-fcmae"]["gmacs"], rel=1e-6)
    assert rows["timm mvitv2_tiny"]["gmacs"] == pytest.approx(0.33, rel=0.01)
    assert rows["timm mvitv2_tiny"]["ms"] >= rows["timm mvitv2_tiny"]["p20_ms"] > 0
    assert "transformers is not installed" in rows["transformers"]["refused"]
    assert "its logits differ" in rows["wrong"]["refused"]
    assert rows["full"]["refused"] == rows["full_in_training"]["refused"] == "out of memory"
    assert "images/s" in capsys.readouterr().out


def test_compare_refuses_ours_where_it_is_wrong(monkeypatch):
    block = NativeLayout.block
    monkeypatch.setattr(NativeLayout, "block", lambda self, x, b: 1.1 * block(self, x, b))
    rows = by_candidate(compare.compare(batch_size=1, image_size="32", rounds=1))
    assert "its logits differ" in rows["sparse-fcmae"]["refused"]
    assert "refused" not in rows["timm"]


def test_compare_of_pretraining(capsys, monkeypatch, tmp_path):
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    monkeypatch.setitem(candidates.VITS, "base", ("small", small))
    options = ["--task", "pretrain", "--batch-size", "2", "--rounds", "2", "--csv", str(tmp_path / "rows.csv")]
    for more in (["--image-size", "64"], ["--image-size", "64", "--dtype", "bf16"], ["--image-size", "64x96"]):
        main(["bench", "compare", *options, *more])
    with (tmp_path / "rows.csv").open() as file:
        ours, peer, *half, _, refused = csv.DictReader(file)
    assert (ours["candidate"], ours["task"], ours["ours_over_it"]) == ("sparse-fcmae, 60 % masked", "pretrain", "1.0")
    assert peer["candidate"] == "transformers MAE small (the smallest), 75 % masked"
    assert all(float(row["ms"]) > 0 and not row["refused"] for row in (ours, peer, *half))
    assert "square images only" in refused["refused"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["bench", "compare", *options, "--drop-path", "0.1"])
    with pytest.raises(SystemExit):
        main(["bench", "compare", *options, "--image-size", "60"])

    loss = iter(range(100))
    candidate = candidates.Candidate(lambda: torch.tensor(float(next(loss))), 1.0)
    assert compare.gated(lambda: candidate)[1] == "its loss does not fall: from 0 to 4"
