"""Kernels, each behind one public function and beside its plain reference; import them from their modules.

Nothing is imported here, so that jaxft.optim, which uses two kernels, needs only jax and optax.
"""
