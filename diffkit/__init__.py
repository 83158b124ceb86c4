"""diffkit: research papers on diffusion models and differentiable methods, each a tested notebook.

Public names are loaded on first use, so that importing the package is cheap; `diffkit.sample`
lives in `diffkit.core.sampling`."""

__version__ = "0.1.0"

from diffkit._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)
