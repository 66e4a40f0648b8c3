"""Kernels, each with one public function and a plain reference; import them from their modules.

Nothing is imported here, so that jaxft.optim, which uses two kernels, needs only jax and optax.
"""
