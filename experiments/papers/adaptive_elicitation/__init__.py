"""Adaptive elicitation of latent information: run main.py."""
