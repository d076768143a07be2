from .cells import (
    KINDS as KINDS,
    CellScores as CellScores,
    Chunk as Chunk,
    EdgeCell as EdgeCell,
    Engine as Engine,
    Lane as Lane,
    Measure as Measure,
    Plan as Plan,
    Runs as Runs,
    StateCell as StateCell,
    effect_of as effect_of,
    halved as halved,
    make_plan as make_plan,
)
from .plain import (
    hidden_edges as hidden_edges,
    plain_scores as plain_scores,
    restored_tokens as restored_tokens,
    run_scores as run_scores,
)
from .positions import (
    Blocks as Blocks,
    Box as Box,
    box_patches as box_patches,
    box_positions as box_positions,
    resolve_rows as resolve_rows,
    window_layers as window_layers,
)
from .scoring import METRICS as METRICS
