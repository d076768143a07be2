"""Image tokens pruned from one layer on, as FastV prunes them."""
