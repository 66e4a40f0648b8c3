"""Small tasks that several papers share, each with exact measures."""
