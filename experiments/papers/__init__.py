"""One script for each paper."""
