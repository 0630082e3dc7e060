"""Files of tensors, models and images, read as data that may be hostile."""
