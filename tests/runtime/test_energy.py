"""The energy that counters say, which begin anew."""

from sparse_fcmae.runtime.energy import EnergyMeter


def package(root, number, microjoules, name=None):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{name or f'package-{number}'}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    return folder


def test_packages_are_added_up_over_the_end_of_their_counters(tmp_path):
    package(tmp_path, 0, 9_000_000)
    package(tmp_path, 1, 0)
    package(tmp_path, 2, 0, name="psys")  # has the packages in it
    meter = EnergyMeter(tmp_path)
    assert meter
    package(tmp_path, 0, 1_000_000)
    package(tmp_path, 1, 500_000)
    package(tmp_path, 2, 7_000_000, name="psys")
    assert meter.read() == 2.5
    package(tmp_path, 1, 3_600_500_000)
    assert meter.read() == 3602.5
    assert str(meter) == "0.001 kWh by the machine's processors"


def test_without_counters_there_is_none(tmp_path):
    assert not EnergyMeter(tmp_path / "none")
    folder = package(tmp_path, 0, 0)
    (folder / "energy_uj").write_text("")
    assert not EnergyMeter(tmp_path)
