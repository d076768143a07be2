"""The differences between architectures: a table with one row each, and the module addresses that follow from it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
