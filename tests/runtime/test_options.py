import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sparse_fcmae import UserError, evaluate, finetune, pretrain
from sparse_fcmae.runtime.options import as_flags, check, image_size_of, keywords_of, listed, option, shown_size


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of this test."""

    out: str = option("here", help="folder", path=True)
    rate: float = option(0.5, help="a rate", above=0, at_most=1)
    count: int | None = option(None, help="a number [all]", at_least=1, below=10)
    size: int = option(1, help="a size")
    kind: str = option("a", help="a kind", choices=("a", "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "`rate` must be greater than 0, not 0.0"),
        ({"rate": 1.5}, "`rate` must be at most 1, not 1.5"),
        ({"rate": float("nan")}, "`rate` must be a finite number, not nan"),
        ({"rate": float("inf")}, "`rate` must be a finite number, not inf"),
        ({"count": 0}, "`count` must be at least 1, not 0"),
        ({"count": 10}, "`count` must be less than 10, not 10"),
        ({"kind": "c"}, "`kind` c: choose one of a, b"),
        ({"rate": "much"}, "`rate` must be a number, not 'much'"),
        ({"rate": [1.0]}, "`rate` must be a number, not [1.0]"),
        ({"size": 2**32}, "`size` must be less than 4294967296, not 4294967296"),
        ({"size": -(10**30)}, f"`size` must be less than 4294967296, not {-(10**30)}"),
        ({"count": 1.5}, "`count` must be a whole number, not 1.5"),
        ({"count": True}, "`count` must be a whole number, not True"),
        ({"kind": 3}, "`kind` 3: choose one of a, b"),
        ({"kind": ["a"]}, "`kind` must be text, not ['a']"),
    ],
)
def test_values_out_of_range(options, message):
    check(Config())
    with pytest.raises(UserError) as error:
        check(Config(**options))
    assert str(error.value) == message


def test_a_function_takes_the_fields_as_its_keywords():
    @keywords_of(Config)
    def work(options: dict) -> dict:
        """Does it."""
        return options

    assert list(inspect.signature(work).parameters) == ["out", "rate", "count", "size", "kind"]
    assert inspect.signature(work).parameters["rate"].default == 0.5
    assert work(out=Path("x"), rate=1) == {"out": "x", "rate": 1}
    assert "Does it." in work.__doc__
    assert "rate: a rate" in work.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'rat'"):
        work(rat=1)


@pytest.mark.parametrize("function", [pretrain, finetune, evaluate])
def test_public_functions_have_explicit_keywords(function):
    parameters = inspect.signature(function).parameters
    assert {"data", "init", "batch_size", "seed"} <= parameters.keys()
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


def test_arguments_in_messages_become_flags():
    message = "`batch_size` 64: give `resume=True`, `clip_grad=1` or `dtype=bf16`, see `sparse-fcmae info` and `other`"
    expected = "--batch-size 64: give --resume, --clip-grad 1 or --dtype bf16, see `sparse-fcmae info` and `other`"
    assert as_flags(message, ["batch_size", "resume", "clip_grad", "dtype"]) == expected


def test_sizes():
    assert image_size_of(224) == image_size_of("224") == (224, 224)
    assert image_size_of("224x320") == image_size_of((224, 320)) == image_size_of([224, 320]) == (224, 320)
    assert (shown_size((224, 224)), shown_size((224, 320))) == ("224", "224x320")
    for wrong in ("big", "1x2x3", (1, 2, 3), None):
        with pytest.raises(UserError, match="give pixels as"):
            image_size_of(wrong)


def test_lists():
    assert listed("batch_size", "8, 16,8", int) == [8, 16]
    for value, message in (("8,x", "give numbers"), ("", "is empty"), ("3", "unknown batch size 3: choose of 1, 2")):
        with pytest.raises(UserError, match=message):
            listed("batch_size", value, int, {1: "", 2: ""} if value == "3" else None)


def test_numbers_of_numpy_are_numbers():
    check(Config(rate=np.float32(0.5), count=np.int64(3)))
    check(Config(rate=1))
