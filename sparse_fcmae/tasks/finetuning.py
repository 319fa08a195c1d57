"""The command `finetune`: a task of its own for each kind of label."""

from pathlib import Path
from typing import Any

from sparse_fcmae.runtime.distributed import process_group
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import keywords_of
from sparse_fcmae.tasks.classification import Classification
from sparse_fcmae.tasks.config import FinetuneConfig
from sparse_fcmae.tasks.segmentation import Segmentation
from sparse_fcmae.training.config import OF_WEIGHTS
from sparse_fcmae.training.configure import configure
from sparse_fcmae.training.loop import train

TASKS = {
    "classification": Classification,
    "multilabel": Classification,
    "regression": Classification,
    "segmentation": Segmentation,
}


@keywords_of(FinetuneConfig)
def finetune(options: dict[str, Any]) -> Path:
    """Fine-tunes a model on images with labels and returns the folder that it is exported to.

    With `resume=True` only `out` is needed: what is left out is as the run was started with. Raises UserError for what
    the user can put right, and Interrupted, after saving a checkpoint, on Ctrl-C or SIGTERM.
    """
    config = configure(FinetuneConfig, options)
    if bool(config.init) == config.from_scratch:
        raise UserError("give `init` with the weights to fine-tune, or `from_scratch=True` for none")
    for name in OF_WEIGHTS:
        if config.init and name in options:
            raise UserError(f"`{name}` goes with `from_scratch` alone: the weights of `init` have their own")
    with process_group(config.device) as ranks:
        return train(TASKS[config.task](config, ranks))
