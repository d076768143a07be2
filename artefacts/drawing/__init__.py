"""Heat maps, curves and pictures with overlays, drawn by matplotlib, which is imported at the first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
