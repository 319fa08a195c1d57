"""Runs that are made up."""

import json

import pytest
from made_up import NAME, made_run


@pytest.fixture
def run(tmp_path):
    return made_run(tmp_path / "run")


@pytest.fixture
def evaluated(run):
    """The run, fine-tuned as it were: with answers on held-out images."""
    (run / "evaluation").mkdir()
    found = {"images": 30, "top1": 0.8, "by_class": {NAME: 0.9, "b": 0.7, "c": None}, "unreadable": []}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(found))
    confusion = {"classes": [NAME, "b", "c"], "counts": [[9, 1, 0], [3, 7, 0], [0, 0, 0]]}
    (run / "evaluation" / "confusion.json").write_text(json.dumps(confusion))
    return run
