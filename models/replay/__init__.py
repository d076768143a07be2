"""Decoder layers run again from any layer on, for only the positions that can have changed.

`replay` runs single layers on single positions: `replaying(vlm)` gives a `Replay`, which records whole runs and calls
layers again. `recording` holds what was recorded and decides which positions a change reaches, where the keys of all
others come from, and what may see what; `attention` attends over such keys in parts and merges the parts by their
log-sum-exp; `cuts` leaves attention edges out, row by row. `padded` does the same for batches of prompts of different
lengths, with gradients and the model's own attention: the editors search for values with it. `witness` watches every
recorded run, of both kinds, and refuses (`ReplayError`) a model whose layers called one by one would not repeat it.
`observe` serves ordinary forward passes: it puts an attention function of ours in place of the model's, reads what
attention did (`attending`) or hides keys from queries (`masking`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
