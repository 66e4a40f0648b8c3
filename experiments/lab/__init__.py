"""Shared code of the scripts of papers: claims with numbers, cached seeds, figures, records."""
