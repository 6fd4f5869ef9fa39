"""Headrace against what a user would pick instead, side by side in one run: see benchmarks/README.md."""
