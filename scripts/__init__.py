"""The command line: the door, the options of each command and, imported on first use, what each command runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
