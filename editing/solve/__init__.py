"""The least-squares problem of a closed-form edit, what a change costs, the editors that pose it and their sessions.

The names are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
