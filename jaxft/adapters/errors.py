"""The error of adapter files."""


class AdapterError(ValueError):
    """An adapter that is missing, damaged, of an unknown kind, or does not fit its model."""
