"""Pruning policies on infected models, compared on equal terms: cells, tables and figures."""

from .cells import OWN, Cell, Result
from .running import Benchmark, benchmark

__all__ = ["OWN", "Benchmark", "Cell", "Result", "benchmark"]
