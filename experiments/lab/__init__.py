"""What the scripts of papers share: claims with intervals, seeds that are kept, curves."""
