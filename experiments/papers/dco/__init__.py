"""Direct coverage optimisation: run main.py."""
