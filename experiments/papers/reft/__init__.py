"""Reinforced fine-tuning: run main.py."""
