"""Exceptions of this package's own."""


class UserError(ValueError):
    """A mistake in what the user gave; the message is one line naming it and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped a run whose last finished step is on the disk."""
