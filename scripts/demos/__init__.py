"""The demo of `multrace demo`: what it edits in each world, the answers around the edits, and the report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
