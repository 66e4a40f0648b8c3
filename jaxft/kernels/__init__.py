"""Kernels, each behind one public function and beside its plain reference; import them from their modules.

Nothing is imported here: jaxft.optim needs two of the kernels, and jax and optax alone.
"""
