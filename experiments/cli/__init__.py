"""Flags that scripts share, and the tables of what each choice stands for."""
