"""Image tokens pruned from one layer on, as FastV prunes them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
