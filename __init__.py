"""multrace: find where a vision-language model keeps a fact, and change it there.

The names are listed in `__init__.pyi` and are imported on first use, so that importing the package is quick. Results,
averages and everything else are in the rooms: `multrace.models`, `multrace.tracing`, `multrace.editing`, ...
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
