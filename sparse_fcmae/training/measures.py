"""What the names of measured values say of them."""

ERRORS = ("loss", "mae", "rmse")
NUMBERS = ("effective_rank", "channel_distance", "r2")  # that are neither errors nor parts of a whole
DETAILS = "distance_"  # how the names of values begin that are recorded, but not said


def is_error(name: str) -> bool:
    """Whether less of a value is better."""
    return any(error in name for error in ERRORS)


def is_fraction(name: str) -> bool:
    """Whether a value is a part of the whole, to be shown in percent."""
    return not (is_error(name) or is_detail(name) or name.endswith(NUMBERS))


def is_detail(name: str) -> bool:
    """Whether a value is one of many, for the page of the run and not for its log."""
    return name.startswith(DETAILS)
