import pytest

from sparse_fcmae import UserError
from sparse_fcmae.runtime.run_folder import newest_checkpoint
from sparse_fcmae.training import checkpoint


def test_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    checkpoint.write_checkpoint(checkpoints, 12, {}, {"step": 12}, keep=3)
    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(UserError, match=r"can't write .*step-00000016: No space left on device"):
        checkpoint.write_checkpoint(checkpoints, 16, {}, {}, keep=3)
    assert newest_checkpoint(tmp_path).name == "step-00000012"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-00000012"]
