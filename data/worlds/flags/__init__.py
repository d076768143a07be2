"""The flags of the world: facts of 254 countries and territories, their flags, and questions. See `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
