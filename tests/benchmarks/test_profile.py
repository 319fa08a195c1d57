import json

from sparse_fcmae.cli import main


def test_profile_names_kernels_and_matrix_products(capsys, tmp_path):
    options = ["--batch-size", "2", "--image-size", "64", "--mask-ratio", "0", "--rounds", "1", "--dtype", "bf16"]
    main(["bench", "profile", *options, "--json", str(tmp_path / "profile.json")])
    rows = {row["what"]: row for row in json.loads((tmp_path / "profile.json").read_text())["rows"]}
    assert rows["matrix products"]["bytes"] > 0
    assert rows["kernel gelu_grn_backward"]["calls"] == 12
    assert "MB moved" in capsys.readouterr().out
