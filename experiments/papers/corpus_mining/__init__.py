"""Corpus mining and multistage fine-tuning: run main.py."""
