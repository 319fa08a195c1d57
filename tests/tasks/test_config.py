from sparse_fcmae.model.convnext import GIANTS, SIZES
from sparse_fcmae.tasks.config import MODELS
from sparse_fcmae.tasks.recipes import PRESETS


def test_the_command_line_knows_every_model_and_preset():
    assert (*SIZES, *GIANTS) == MODELS
    assert set(PRESETS) == {*MODELS, "probe"}
