"""Scripts: one job each, over jaxft."""
