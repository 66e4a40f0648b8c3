"""mBART: translation between many languages, with norms before the sublayers."""

from jaxft.models.mbart.record import MBART

__all__ = ["MBART"]
