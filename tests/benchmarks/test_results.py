import csv
import json

import pytest
import torch

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks import results
from sparse_fcmae.benchmarks.config import OutputConfig, ThroughputConfig
from sparse_fcmae.benchmarks.gflops import gflops
from sparse_fcmae.cli import main


def test_rows_are_appended_with_what_they_depend_on(tmp_path):
    path = tmp_path / "rows.csv"
    for model in ("atto", "tiny"):
        gflops(model=model, image_size="224", csv=str(path))
    gflops(model="atto", image_size="224", mask_ratio="0", csv=path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["model"] for r in rows if r["part"] == "whole"] == ["atto", "tiny", "atto"]
    assert all(r["benchmark"] == "gflops" and r["torch"] == torch.__version__ and r["commit"] for r in rows)
    assert rows[-1]["command"] == "sparse-fcmae bench gflops --model atto --image-size 224 --mask-ratio 0"


def test_new_columns_join_those_of_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    results.append_csv(path, "none", {"torch": "2"}, [])  # a table that is empty starts no file
    assert not path.exists()
    results.append_csv(path, "one", {"torch": "2"}, [{"a": 1}])
    results.append_csv(path, "two", {"torch": "2"}, [{"b": 2}])
    assert path.read_text().splitlines() == ["benchmark,a,torch,b", "one,1,2,", "two,,2,2"]


def test_what_a_row_says_itself_is_not_what_the_machine_has(tmp_path):
    path = tmp_path / "rows.csv"
    results.append_csv(path, "scaling", {"threads": 8, "torch": "2"}, [{"threads": 1}, {"threads": 2}, {"ms": 3}])
    assert path.read_text().splitlines() == [
        "benchmark,threads,torch,ms",
        "scaling,1,2,",
        "scaling,2,2,",
        "scaling,8,2,3",
    ]


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
        results.check_outputs(OutputConfig(**{name: str(tmp_path / place)}))
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
