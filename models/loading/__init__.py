"""Opening a model: its files, its device, its processor, and the proof of its addresses."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
