import pytest

from sparse_fcmae import UserError
from sparse_fcmae.evaluation.imagenet import (
    ALEXNET,
    mean_corruption_error,
    outputs_of,
    wordnet_ids,
)


def test_outputs_of_classes():
    ids = wordnet_ids()
    assert (len(ids), ids[0], ids[999]) == (1000, "n01440764", "n15075141")
    assert list(ids) == sorted(ids)
    some, numbers = (ids[7], ids[300]), ("10", "9")
    words = [f"word {i}" for i in range(1000)]
    assert outputs_of(some, 1000, None).tolist() == [7, 300]
    assert outputs_of(some, 1000, ["tench, Tinca tinca", *words[1:]]).tolist() == [7, 300]
    assert outputs_of(some, 3, ["a", ids[300], ids[7]]).tolist() == [2, 1]
    assert outputs_of(some, 2, None).tolist() == [0, 1]
    assert outputs_of(numbers, 1000, None).tolist() == [10, 9]
    for classes, outputs, names, message in (
        (some, 5, None, "`data` has 2 class folders but the head 5 outputs"),
        (some, 2, ["a", "b"], f"class {ids[7]} is none of the head's 2 classes: a, b"),
        (some, 1000, words, "is none of the head's 1000 classes: word 0, "),
        (numbers, 11, words[:11], "class 10 is none"),
    ):
        with pytest.raises(UserError, match=message):
            outputs_of(classes, outputs, names)


def test_mean_corruption_error_is_relative_to_alexnets():
    errors = {name: {str(severity): rate for severity in range(1, 6)} for name, rate in ALEXNET.items()}
    assert mean_corruption_error(errors) == pytest.approx(1)
    errors["snow"]["5"] = 0
    assert mean_corruption_error(errors) == pytest.approx(1 - 0.2 / 15)
    assert mean_corruption_error(errors | {"saturate": {"1": 1.0}}) == pytest.approx(1 - 0.2 / 15)
    del errors["snow"]["5"]
    assert mean_corruption_error(errors) is None
    assert mean_corruption_error({"saturate": {"1": 1.0}}) is None
