"""Facts as plain values: records, the synthetic world and the embedded model's folder. See `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
