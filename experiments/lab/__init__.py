"""What the scripts of papers share: claims with numbers, seeds that are kept, figures, records."""
