"""Readers of public data files, one file each, into plain questions and edit records. See `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
