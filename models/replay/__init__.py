"""Decoder layers run again from any layer on, for only the positions that can have changed.

`replay` runs single layers on single positions: `replaying(vlm)` gives a `Replay`, which records whole runs and calls
layers again. Its `UpperLayers` does the same for batches of prompts of different lengths, with gradients and the
model's own attention; the editors search for values with it. `recording` holds what was recorded, decides which
positions a change reaches, where the keys of all others come from and what may see what, and leaves attention edges
out, row by row (`Cut`). `running` continues layers that have a running state in place of attention. `attention` attends
over such keys in parts and merges the parts by their log-sum-exp. `observe` holds the `Witness` of every recorded run,
which refuses (`ReplayError`) a model whose layers called one by one would not repeat it; for ordinary forward passes,
it replaces the model's attention function or hides keys from queries (`masking`). `attending` reads what attention did.
`crossing` knows the layers that attend to pictures, at no position of the prompt.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
