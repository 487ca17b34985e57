"""Ferrum next to other engines on a CPU: `python -m benchmarks.cpu --help`."""
