"""What the benchmarks share: models of a given shape, the field's way to trace, counted work and peak memory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
