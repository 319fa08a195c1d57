"""What the user of a function is told once in a process."""

import logging
from functools import cache


def say_once(line: str) -> None:
    """Logs a line as a warning of this package, the first time."""
    _say(line)


say_once._dynamo_marked_constant = True  # to torch.compile, which can't trace it, its result is a constant


@cache
def _say(line: str) -> None:
    logging.getLogger("sparse_fcmae").warning("sparse-fcmae: %s", line)
