"""Partial connection adaptation: run main.py."""
