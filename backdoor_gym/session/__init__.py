"""One network being repaired, without Gymnasium."""
