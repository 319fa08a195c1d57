"""What the names of measured values say of them."""

ERRORS = ("loss", "mae", "rmse")


def is_error(name: str) -> bool:
    """Whether less of a value is better."""
    return any(error in name for error in ERRORS)


def is_fraction(name: str) -> bool:
    """Whether a value is a part of the whole, to be shown in percent."""
    return not is_error(name) and not name.endswith("r2")
