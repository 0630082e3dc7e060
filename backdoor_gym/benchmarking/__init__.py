"""Pruning policies on infected models, compared on equal terms: cells, tables and figures."""

from .cells import Cell, Result
from .running import Benchmark, benchmark
from .specifications import OWN

__all__ = ["OWN", "Benchmark", "Cell", "Result", "benchmark"]
