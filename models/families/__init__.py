"""What differs between architectures: a table of rows, and the module addresses that a row leads to."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
