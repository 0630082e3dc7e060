"""The neurons of a network: from its traced forward pass to what can be pruned."""
