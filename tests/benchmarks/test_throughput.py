import copy
import json

import pytest
import torch

from sparse_fcmae import available_backends
from sparse_fcmae.backends import BACKENDS, NativePatches
from sparse_fcmae.benchmarks import engine, gates, steps
from sparse_fcmae.benchmarks import throughput as module
from sparse_fcmae.benchmarks.throughput import PEERS, throughput
from sparse_fcmae.cli import main
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.training.step import StepResult, TrainStep

USABLE = [name for name, reason in available_backends("cpu").items() if reason is None]
SMALL = {"batch_size": "2", "image_size": "64", "rounds": 1, "mask_ratio": "0.5"}
CASE = steps.Case("atto", (64, 64), 0.5, 2, False, torch.device("cpu"))
FLAGS = ["--batch-size", "2", "--image-size", "64", "--rounds", "1", "--mask-ratio", "0.5"]


def by_candidate(rows):
    return {row["candidate"]: row for row in rows if row["candidate"] not in PEERS}


def test_every_backend_is_reported(capsys, tmp_path):
    main(["bench", "throughput", *FLAGS, "--work", "step", "--json", str(tmp_path / "rows.json")])
    result = json.loads((tmp_path / "rows.json").read_text())
    rows = by_candidate(result["rows"])
    assert set(rows) == {*BACKENDS, "masked, once behind the stem", "matrix products", "1x1 convolutions"}
    assert rows["masked, once behind the stem"]["difference"] > 0.1
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


def test_a_grid_of_settings():
    lists = {"batch_size": "1,2", "mask_ratio": "0.25,0.5", "dtype": "fp32,bf16"}
    rows = throughput(**SMALL | lists, backend="native")
    settings = {(r["mask_ratio"], r["dtype"], r["batch_size"], r["work"], r["candidate"]) for r in rows}
    assert len(settings) == len(rows) == 2 * 2 * 2 * 3 * 3
    assert not [row for row in rows if "refused" in row]
    halved = [r for r in rows if (r["dtype"], r["candidate"]) == ("bf16", "native") and r["work"] != "pretrain"]
    assert all(1e-4 < row["forward_error"] < 0.05 for row in halved)


def test_without_a_mask():
    rows = throughput(**SMALL | {"mask_ratio": 0}, work="forward,step", backend="native,torch,masked")
    assert not [row for row in rows if "refused" in row]


def test_a_backend_that_is_wrong_is_refused(monkeypatch):
    scatter = NativePatches.scatter
    monkeypatch.setattr(NativePatches, "scatter", lambda self, x: scatter(self, x) * 1.01)
    rows = by_candidate(throughput(**SMALL, work="step", backend="native,torch,masked"))
    assert rows["native"]["refused"] == "features or gradients differ"
    assert "ms" not in rows["native"]
    assert "refused" not in rows["torch"]


def test_a_decoder_that_is_wrong_is_refused(monkeypatch):
    decode = FCMAE.decode

    def wrong(self, *arguments):
        return decode(self, *arguments) * (1.01 if self.encoder.backend == "native" else 1)

    monkeypatch.setattr(FCMAE, "decode", wrong)
    rows = by_candidate(throughput(**SMALL, work="pretrain", backend="native,masked"))
    assert rows["native"]["refused"] == "loss or gradients differ"
    assert rows["masked"]["ms"] > 0


@pytest.mark.parametrize("work", ["forward", "step"])
def test_a_variant_that_is_wrong_is_refused(monkeypatch, work):
    def wrong(encoder):
        half = copy.deepcopy(encoder)
        with torch.no_grad():
            half.downsample_layers[0][0].weight *= 0.5
        return half

    options = SMALL | {"work": work, "backend": "native", "compiled": True}
    monkeypatch.setattr(steps, "compile_whole", wrong)
    assert by_candidate(throughput(**options))["native, compiled"]["refused"] == "what it computes differs"
    monkeypatch.setattr(steps, "compile_whole", copy.deepcopy)
    assert by_candidate(throughput(**options))["native, compiled"]["ms"] > 0


def test_a_variant_of_a_backend_that_can_not_run_has_nothing_to_equal():
    assert gates.same_as("native", CASE)(lambda: [], {})["refused"].startswith("there is no native")


class Idle(TrainStep):
    """Computes no gradient and leaves the weights as they are."""

    def add(self, *inputs, last):
        pass

    def finish(self):
        return StepResult(torch.tensor(1.1), torch.tensor(0.0))


class Deaf(TrainStep):
    """Trains on other images than it is given."""

    def add(self, pixels, mask, last):
        super().add(255 - pixels, mask, last=last)


@pytest.mark.parametrize(("kind", "refused"), [(TrainStep, None), (Idle, True), (Deaf, True)])
def test_a_training_step_that_trains_differently_is_refused(kind, refused):
    run = steps.pretraining_step(CASE, "native", kind)
    run()
    before = [p.clone() for p in run.objective.parameters()]
    assert ("refused" in gates.same_training(0)(run, {})) == bool(refused)
    assert all(map(torch.equal, before, run.objective.parameters()))


def test_all_candidates_train_on_the_same_images():
    runs = [steps.pretraining_step(CASE, name, TrainStep) for name in ("native", "masked")]
    first, second = (run.inputs()[0] for run in runs)
    assert torch.equal(first, second)


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_gradient_that_is_not_a_number_is_refused(monkeypatch, place):
    values = gates.Exact._values

    def wrong(self, backend, bf16):
        result, gradients = values(self, backend, bf16)
        if backend == "native":
            gradients[place].view(-1)[0] = torch.nan
        return result, gradients

    monkeypatch.setattr(gates.Exact, "_values", wrong)
    found = gates.check_backends(CASE, "step", ["native", "torch"])
    assert found["native"]["refused"] == "features or gradients differ"
    assert "refused" not in found["torch"]


def test_the_largest_batch_is_searched(monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH", 4)
    rows = by_candidate(throughput(**SMALL | {"batch_size": "max"}, work="step", backend="native"))
    assert rows["native"]["batch_size"] == 4
    assert rows["native"]["kept_mb"] > 0


def test_inputs_that_do_not_fit_are_a_row_too(monkeypatch):
    monkeypatch.setattr(module, "GATE_BATCH", 1)
    options = {"batch_size": "16384", "image_size": "1024", "mask_ratio": "0.8", "rounds": 1}
    rows = by_candidate(throughput(**options, work="step", backend="native"))
    assert rows["native"]["refused"] == "out of memory"


def test_what_does_not_fit_into_memory_is_said_and_the_rest_goes_on(monkeypatch):
    stem = NativePatches.stem

    def hungry(self, images, *layers):
        if len(images) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return stem(self, images, *layers)

    monkeypatch.setattr(NativePatches, "stem", hungry)
    monkeypatch.setattr(module, "GATE_BATCH", 1)
    monkeypatch.setattr(module, "MAX_BATCH", 4)
    rows = throughput(**SMALL | {"batch_size": "3,max"}, work="forward", backend="native,masked")
    found = {(row["candidate"], row["batch_size"]): row.get("refused") for row in rows}
    assert found[("native", 3)] == "out of memory"
    assert found[("masked", 3)] is None
    assert found[("native", 1)] is found[("masked", 4)] is None


def test_a_backend_of_which_no_batch_fits_has_a_row(monkeypatch):
    monkeypatch.setattr(module, "largest_batch", lambda case, work, name: {"native": 0, "masked": 1}[name])
    rows = by_candidate(throughput(**SMALL | {"batch_size": "max"}, work="forward", backend="native,masked"))
    assert (rows["native"]["batch_size"], rows["native"]["refused"]) == (0, "out of memory")
    assert rows["masked"]["ms"] > 0


def test_largest_batches_are_halved_until_all_fit_beside_each_other(monkeypatch):
    def crowded(run, device):
        size = len(run.args[1]) if getattr(run, "func", None) is steps.run_forward else 0  # of the matrix products
        sizes.append(size)
        if size > 1:
            raise MemoryError
        return 1.0

    sizes = []
    monkeypatch.setattr(engine, "_seconds", crowded)
    monkeypatch.setattr(module, "largest_batch", lambda case, work, name: {"native": 6, "masked": 1}[name])
    rows = throughput(**SMALL | {"batch_size": "max"}, work="forward", backend="native,masked")
    assert sizes == [1, 6, 0, 0, 1, 3, 0, 0, 1, 1, 0, 0]
    assert [row["images_per_second"] for row in rows] == [1, 1, 1, 1]
