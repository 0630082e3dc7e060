"""The prunable neurons of a network, the network under a mask, and masks made permanent."""
