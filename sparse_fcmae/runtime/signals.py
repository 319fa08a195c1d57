"""The signals that a training run heeds."""

import signal

# Ctrl-C, the end of a job, pre-emption as SLURM is told to announce it, and the loss of a terminal; not all of them are
# there on Windows
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)
