"""What is said of runs whose rows are made up."""

import json
import re

import numpy as np
import pytest

from sparse_fcmae.evaluation.verdict import BROKEN, EARLY, LEARNING, judge
from sparse_fcmae.runtime.rows import Rows

STEPS, WARMUP = 1000, 50


@pytest.fixture
def said(tmp_path):
    """The verdict on losses and evaluations."""

    def of(losses, evaluations=(), steps=STEPS, lr=1e-3, **kind):
        rows = [{"step": n + 1, "epoch": n / 10, "loss": loss, "lr": lr} for n, loss in enumerate(losses)]
        found = []
        for name, lines in (("metrics.jsonl", rows), ("evaluations.jsonl", evaluations)):
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
            found.append(Rows(tmp_path / name))
            found[-1].read_on()
        return judge(*found, WARMUP, steps, **kind)

    return of


def falling(to, count=STEPS, start=1.0):
    return [to + (start - to) * float(np.exp(-n / 100)) for n in range(count)]


def test_a_run_that_learns(said):
    verdict = said(falling(0.5, 600))
    assert verdict.state == LEARNING
    assert str(verdict) == "learning: 50 % of what is hidden is filled in, 0.4 points more than at step 480"
    assert str(said(falling(0.5))).endswith("50 % of what is hidden is filled in, as at step 800")


@pytest.mark.parametrize(("done", "state"), [(0, EARLY), (20, EARLY), (149, EARLY), (150, LEARNING)])
def test_at_first_nothing_is_said(said, done, state):
    verdict = said(falling(0.5, done))
    assert verdict.state == state
    assert ("ask again after step 150" in verdict.reason) == (25 <= done < 150)


def test_a_run_that_ends_before_it_could_be_judged_is_judged_at_its_end(said):
    assert said(falling(0.5, 90), steps=90).state == LEARNING


def test_nothing_learnt(said):
    verdict = said([1.0] * 400)
    assert verdict.state == BROKEN
    assert "nothing of what is hidden is filled in (loss 1.0000, at first 1.0000)" in verdict.reason
    assert "--lr-range" in verdict.reason
    assert "sparse-fcmae inspect" in verdict.reason
    assert said([1.0, *[0.96] * 400]).state == BROKEN
    assert said([1.0, *[0.94] * 400]).state == LEARNING


def test_images_with_areas_of_one_colour_begin_below_one(said):
    assert said([0.6] * 400).state == BROKEN
    assert said(falling(0.3, 600, start=0.6)).reason.startswith("50 % of what is hidden")


def test_images_of_one_colour_have_nothing_to_fill_in(said):
    for losses in ([0.0] * 400, falling(0.0, 400, start=0.006)):
        verdict = said(losses)
        assert verdict.state == BROKEN
        assert "hardly anything to fill in" in verdict.reason


def test_a_run_from_weights_does_not_begin_with_nothing(said):
    verdict = said([0.5] * 400, from_weights=True)
    assert str(verdict) == "learning: the loss is 0.5000, and was 0.5000 at the start"
    assert said([0.5] * 400).state == BROKEN
    assert said([0.5] * 200 + [0.6] * 200, from_weights=True).state == BROKEN


def test_targets_that_are_not_normalised_may_cost_more_than_one(said):
    losses = falling(1.0, 600, start=2.0)
    assert said(losses, normalised=False).reason.startswith("50 % of what is hidden")
    assert said(losses).state == BROKEN


def test_a_run_that_loses_ground_is_not_said_to_stand_still(said):
    verdict = said([*falling(0.5, 600), *np.linspace(0.5, 0.54, 200)])
    assert verdict.state == LEARNING
    assert re.search(r", [\d.]+ points fewer than at step 640", verdict.reason)


def test_a_run_whose_last_steps_are_not_finite_has_diverged(said):
    verdict = said(falling(0.5, 900) + [None] * 5, steps=100_000)
    assert verdict.state == BROKEN
    assert "5 of the last 905 steps were not finite" in verdict.reason


def test_what_is_asked_for_later_can_happen(said):
    assert "ask again after step 80" in said(falling(0.5, 40), steps=80).reason
    assert str(said(falling(0.5, 20), steps=20)) == "too early to say: 20 steps are too few"


def test_worse_than_nothing_is_said_early(said):
    verdict = said([1.0] * 10 + [3.0] * 50)
    assert said([1.0] * 10 + [1.5] * 39).state == EARLY  # in the warm-up
    assert verdict.state == BROKEN
    assert "the loss is 3, and was 1 before anything was learnt: try --lr 0.00025" in verdict.reason


def test_steps_that_are_not_finite(said):
    verdict = said([1.0] + [0.5] * 300 + [0.5, None] * 25)
    assert verdict.state == BROKEN
    assert "25 of the last 50 steps were not finite" in verdict.reason
    assert said([1.0] + [0.5] * 300 + [None] + [0.5] * 49).state == LEARNING


def test_what_was_learnt_and_lost(said):
    verdict = said([*falling(0.5, 500), *[0.8] * 100])
    assert verdict.state == BROKEN
    assert "20 % of what is hidden is filled in, and it was 50 % before" in verdict.reason
    assert said([*falling(0.5, 500), *[0.55] * 100]).state == LEARNING


def test_features_that_collapse(said):
    whole = {"step": 500, "epoch": 50, "effective_rank": 40.0, "channel_distance": 0.3}
    whole |= {"distance_1.1": 0.4, "distance_3.2": 0.3}
    assert "effective rank 40, channels 0.30 apart" in said(falling(0.5), [whole]).reason
    one_channel = whole | {"channel_distance": 0.08, "distance_3.2": 0.08}
    assert said(falling(0.5), [whole, one_channel]).state == BROKEN
    assert "the channels of block 3.2 have become one" in said(falling(0.5), [whole, one_channel]).reason
    one_direction = said(falling(0.5), [whole, whole | {"effective_rank": 1.2}])
    assert one_direction.state == BROKEN
    assert "all images have the same features" in one_direction.reason
    # an evaluation without a check of features leaves the last one standing
    assert said(falling(0.5), [one_channel, {"step": 600, "epoch": 60, "val_loss": 0.5}]).state == BROKEN


def test_what_held_out_images_and_labels_say(said):
    evaluations = [
        {"step": n, "epoch": n / 10, "val_loss": v, "knn_top1": k} for n, v, k in ((0, 1, 0.2), (5, 0.5, 0.3))
    ]
    verdict = said(falling(0.4), evaluations)
    assert verdict.state == LEARNING
    assert verdict.reason.endswith("k-NN 30.0 %, at the start 20.0 %")
    verdict = said(falling(0.4), [*evaluations, {"step": 9, "epoch": 2, "val_loss": 0.53}])
    assert "risen from 0.5000 to 0.5300" in verdict.reason
    assert "risen" not in said(falling(0.4), [*evaluations, {"step": 9, "epoch": 2, "val_loss": 0.52}]).reason
