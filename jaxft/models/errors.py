"""The error of files that hold no model, or another than they say."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of an unknown kind, or does not fit its model."""
