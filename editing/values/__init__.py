"""Where an edit is made and what it wants there: targets, keys, and the search for values.

The names are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
