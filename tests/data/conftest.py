import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def ramp():
    """Pixels uint8 [30, 40, 3] that all differ from their neighbours a little."""
    return np.linspace(0, 255, 40 * 30 * 3).astype(np.uint8).reshape(30, 40, 3)


@pytest.fixture(scope="session")
def photograph():
    """A function that makes noise with the spectrum of photographs, whose amplitudes fall as one over the frequency."""

    def make(width, height, seed=0):
        rng = np.random.default_rng(seed)
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = np.inf
        spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
        values = np.fft.irfft2(spectrum, (height, width))
        values = 127 + 50 * values / values.std()
        return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())

    return make
