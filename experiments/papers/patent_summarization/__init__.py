"""Summaries of patents: run main.py."""
