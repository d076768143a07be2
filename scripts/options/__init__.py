"""What one may ask of each command. Nothing here imports torch, so that help and misspelt options cost no time.

Each command has a module with HELP (one line), EXAMPLE (the end of its help) and OPTIONS, a frozen dataclass of
`option`s; its docstring opens the help. The module of the same name in `multrace.scripts` has `run(options)`. Rooms are
imported whole and used by attribute (`models.load`), because their faces import nothing until a name is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
