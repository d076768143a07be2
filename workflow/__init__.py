"""Tracing and editing together: locate where a fact is kept, then edit there. See `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
