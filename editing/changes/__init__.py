"""Made edits as values: factors of weights, files, exports, the history of a model's edits.

The names are listed in `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
