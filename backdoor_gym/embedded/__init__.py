"""Infected models that come with the package; benchmarks/training.py makes them."""
