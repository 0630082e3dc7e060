"""Work on a Ray cluster; loaded only where an address of one is given."""
