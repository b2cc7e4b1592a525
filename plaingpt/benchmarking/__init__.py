"""What bench.py compares this repository with."""
