"""Infected models that come with the package; benchmarks/embedded.py made them."""
