"""Fine-tuning Language Models for Factuality: run main.py."""
