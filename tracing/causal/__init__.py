"""Causal tracing: corrupt the constraint or the picture, restore clean states, and see which recover the answer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
