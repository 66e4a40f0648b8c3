"""A survey of reasoning, its methods at equal compute: run main.py."""
