"""How the flags model is made: its teacher, its student, its training stages and its examination."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
