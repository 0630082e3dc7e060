"""One network being repaired, without Gymnasium."""

from .session import RepairSession

__all__ = ["RepairSession"]
