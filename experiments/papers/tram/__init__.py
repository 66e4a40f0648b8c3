"""Trust region aware minimisation: run main.py."""
