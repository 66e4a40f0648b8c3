"""Reinforcement fine-tuning of multimodal models: run main.py."""
