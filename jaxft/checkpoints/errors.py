"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of an unknown kind, or does not fit its model."""
