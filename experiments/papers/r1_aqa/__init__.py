"""R1-AQA: run main.py."""
