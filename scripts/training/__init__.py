"""How the embedded model is made: its parts, its two training stages and its examination; beside it the flags model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
