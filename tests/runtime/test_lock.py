import subprocess
import sys

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.runtime.lock import lock_folder

PROGRAM = "import sys; from pathlib import Path; from sparse_fcmae.runtime.lock import lock_folder; "
PROGRAM += "held = lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def test_a_folder_is_kept_until_its_process_is_gone(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is in use by another process: wait for it or choose another"):
        lock_folder(tmp_path)
    process.kill()
    process.communicate()
    assert lock_folder(tmp_path) is not None
