"""The error of files that do not contain the model that they describe."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of an unknown kind, or does not fit its model."""
