from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.runtime import compute


def test_the_command_line_knows_every_backend():
    assert ("auto", *BACKENDS) == compute.BACKENDS
