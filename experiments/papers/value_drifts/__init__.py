"""Value drifts during post-training: run main.py."""
