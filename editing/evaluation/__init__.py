"""What an edit did: questions asked before and after it, the metrics, and the reports. The names are listed in `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
