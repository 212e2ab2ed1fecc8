"""FourierFT: coefficients of a sparse spectrum."""

from tunewise.core.method import method
from tunewise.core.recipe import Recipe
from tunewise.delta.spectral import FourierFT


@method("fourierft", title="Fourier transform fine-tuning", arxiv="2405.03003", lr=(2e-3, 1e-2, 5e-2))
def fourierft(
    frequencies: int = 1000, scale: float = 150.0, seed: int = 777, sites: str | list[str] = "linear"
) -> Recipe:
    """W' = W + scale Re(ifft2(F)), F with trained coefficients at random places."""
    return Recipe(delta=FourierFT(frequencies, scale, seed, sites))
