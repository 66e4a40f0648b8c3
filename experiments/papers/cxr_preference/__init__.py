"""Preference fine-tuning for factuality in chest X-ray reports: run main.py."""
