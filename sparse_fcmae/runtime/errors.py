"""The package's own exceptions."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line that names the mistake and the remedy.

    Arguments stand in backticks, alone or with a value: "`batch_size` 64 is too large" or "give `resume=True`". A
    Python traceback shows them so. The command line shows the same arguments as its flags (`options.as_flags`), prints
    the line without a traceback, and exits with code 2.
    """


class Interrupted(Exception):
    """A signal, such as Ctrl-C or SIGTERM, stopped a run after its last finished step was saved.

    The command line exits with code 75, which means that it is worth trying again: to go on with `resume`.
    """
