"""The benchmarks of `multrace bench`: random models of a given shape, and multrace timed beside the usual ways."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
