import json

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks.results import append_csv
from sparse_fcmae.benchmarks.summary import MARKS, summary
from sparse_fcmae.cli import main

SETTING = {"device": "NVIDIA Fast", "torch": "2.13", "commit": "abc", "date": "2026-01-01", "triton": "3.7"}
CASE = {"model": "tiny", "batch_size": 128, "dtype": "bf16", "image_size": "224", "mask_ratio": 0.6, "work": "step"}


def row(candidate, speed, **others):
    return CASE | {"candidate": candidate, "images_per_second": speed, "ms": 128e3 / speed} | others


ROWS = [
    row("native", 1000.0, peak_mb=10.0),
    row("native, graph", 8000.0, speedup=4.25),  # the median of ratios, which is not the ratio of medians
    row("masked", 2000.0, peak_mb=80.0),
    row("masked, compiled", 4000.0),
    row("torch", 1600.0),
    row("matrix products", 50000.0),
    row("native", 500.0, work="pretrain", speedup=2.0),
    row("masked", 250.0, work="pretrain"),
    {"candidate": "spconv", "refused": "not here"},
    row("masked", 100.0, model="base"),
]
TABLE = """\
NVIDIA Fast, torch 2.13, triton 3.7:

| model, images, dtype | work | images/s | over `masked` | over `torch` | peak MB, `masked`'s | commit |
| -------------------- | ---- | -------- | ------------- | ------------ | ------------------- | ------ |
| tiny, 128, bf16 | encoder, forward and backward, graph | 8,000 | 4.2 | 5.0 | 10, 80 | abc |
| tiny, 128, bf16 | whole pretraining step | 500 | 2.0 |  |  | abc |"""


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_rows_become_a_table(tmp_path, capsys, kind):
    if kind == "csv":
        append_csv(tmp_path / "rows.csv", "throughput", SETTING, ROWS)
    else:
        whole = {"benchmark": "throughput", "environment": SETTING, "rows": ROWS}
        (tmp_path / "rows.json").write_text(json.dumps(whole))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "other.json").write_text("[1]")
    main(["bench", "summary", str(tmp_path)])
    assert capsys.readouterr().out == f"{TABLE}\n"


def test_it_goes_between_the_marks_of_a_document(tmp_path):
    append_csv(tmp_path / "rows.csv", "throughput", SETTING, ROWS)
    document = tmp_path / "README.md"
    document.write_text(f"Before.\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nAfter.\n")
    for _ in range(2):
        summary(rows=str(tmp_path / "*.csv"), into=document)
        assert document.read_text() == f"Before.\n\n{MARKS[0]}\n{TABLE}\n{MARKS[1]}\n\nAfter.\n"


@pytest.mark.parametrize("text", ["no marks", MARKS[1] + MARKS[0], 2 * (MARKS[0] + MARKS[1])])
def test_a_document_without_its_place_is_left_alone(tmp_path, text):
    append_csv(tmp_path / "rows.csv", "throughput", SETTING, ROWS)
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(UserError, match="needs one line <!-- bench summary -->"):
        summary(rows=str(tmp_path / "*.csv"), into=document)
    assert document.read_text() == text


def test_nothing_to_show(tmp_path):
    with pytest.raises(UserError, match="there is nothing"):
        summary(rows=str(tmp_path))
    append_csv(tmp_path / "rows.csv", "throughput", SETTING, ROWS[2:6])
    document = tmp_path / "README.md"
    document.write_text(before := f"{MARKS[0]}\na table\n{MARKS[1]}\n")
    with pytest.raises(UserError, match="has no rows of `bench throughput`"):
        summary(rows=str(tmp_path), into=document)
    assert document.read_text() == before


def test_a_line_is_of_one_run_and_a_table_of_one_machine(tmp_path):
    append_csv(tmp_path / "a.csv", "throughput", SETTING | {"device": "cpu", "cpu": "Slow", "command": "a"}, ROWS)
    faster = [row | {"images_per_second": 9 * row["images_per_second"]} for row in ROWS if "ms" in row]
    append_csv(tmp_path / "b.csv", "throughput", SETTING | {"device": "cpu", "cpu": "Fast", "command": "a"}, faster)
    append_csv(tmp_path / "c.csv", "report", SETTING | {"device": "cpu", "cpu": "Slow", "command": "b"}, faster[:1])
    tables = summary(rows=str(tmp_path)).split("\n\n")
    assert [text.split(",")[0] for text in tables[::2]] == ["Slow", "Fast"]
    assert tables[1].count(" | 8,000 | 4.2 | 5.0 | 10, 80 |") == tables[1].count(" | 9,000 |  |  | 10, - |") == 1
    assert tables[3].count(" | 72,000 | 4.2 | 5.0 | 10, 80 |") == 1
