"""The one drawing of a network's neurons, and the window that shows it."""
