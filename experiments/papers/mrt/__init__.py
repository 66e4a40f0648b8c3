"""Meta reinforcement fine-tuning: run main.py."""
