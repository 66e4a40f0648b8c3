"""Flags that scripts share, and the tables of their choices."""
