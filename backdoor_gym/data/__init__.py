"""Data sets, and a user's own images."""
