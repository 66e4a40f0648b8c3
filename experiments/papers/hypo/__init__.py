"""Hybrid preference optimisation: run main.py."""
