"""Intrinsic dimension of fine-tuning: run main.py."""
