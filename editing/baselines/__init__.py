"""Editors that train or prompt instead of solving: fine-tuning, LoRA and facts in the context.

The names are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
