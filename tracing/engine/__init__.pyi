from .cells import (
    KINDS as KINDS,
    CellScores as CellScores,
    EdgeCell as EdgeCell,
    Engine as Engine,
    Measure as Measure,
    Runs as Runs,
    StateCell as StateCell,
)
from .plain import (
    hidden_edges as hidden_edges,
    plain_scores as plain_scores,
    restored_tokens as restored_tokens,
    run_scores as run_scores,
)
from .plan import (
    Chunk as Chunk,
    Lane as Lane,
    Plan as Plan,
    effect_of as effect_of,
    halved as halved,
    make_plan as make_plan,
)
from .positions import Blocks as Blocks, Box as Box, box_patches as box_patches, box_positions as box_positions
from .rows import resolve_rows as resolve_rows, window_layers as window_layers
from .scoring import METRICS as METRICS
