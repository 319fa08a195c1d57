"""The energy that the machine has taken, where it says so: processors by Linux's powercap, NVIDIA GPUs by NVML."""

from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


class EnergyMeter:
    """Adds up what counters have gone on by. `read` has to be called at least every few minutes, as they begin anew."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.joules, self.gpus = 0.0, []
        self.packages: dict[Path, float] = {}
        for folder in sorted(powercap.glob("intel-rapl:[0-9]*")) if powercap.is_dir() else ():
            with suppress(OSError, ValueError):  # root alone may read it on many machines
                if (folder / "name").read_text().startswith("package"):
                    self.packages[folder] = _microjoules(folder / "energy_uj")
        with suppress(Exception):  # not installed, or no GPU
            import pynvml

            pynvml.nvmlInit()
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            self.gpus = [(handle, pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles]

    def __bool__(self) -> bool:
        return bool(self.packages or self.gpus)

    def read(self) -> float:
        """The joules that were taken since the meter was made."""
        with suppress(OSError, ValueError):
            for folder, before in self.packages.items():
                now = _microjoules(folder / "energy_uj")
                gone = now - before if now >= before else now + _microjoules(folder / "max_energy_range_uj") - before
                self.packages[folder], self.joules = now, self.joules + gone / 1e6
        with suppress(Exception):  # a GPU that is lost
            for number, (handle, before) in enumerate(self.gpus):
                import pynvml

                now = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                self.gpus[number], self.joules = (handle, now), self.joules + (now - before) / 1e3
        return self.joules

    def __str__(self) -> str:
        parts = ["processors"] * bool(self.packages) + [f"{len(self.gpus)} GPUs"] * bool(self.gpus)
        return f"{self.read() / JOULES_PER_KWH:.3g} kWh by the machine's {' and '.join(parts)}"


def _microjoules(file: Path) -> float:
    return float(file.read_text())
