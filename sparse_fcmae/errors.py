"""The one exception type for what a user can put right."""


class UserError(ValueError):
    """A mistake in what the user gave; the message is one line naming it and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
