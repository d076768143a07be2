"""Second moments of keys: collected over prompts, watched while they converge, kept in a cache.

The names are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
