"""Questions that an edit leaves alone without being told to: other subjects, other pictures, other relations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
