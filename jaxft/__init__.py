"""jaxft: fine-tuning of foundation models in JAX. Import the packages you need: jaxft.models, ..."""

__version__ = "0.1.0"
