from .anchor import NormAnchors as NormAnchors, anchor_norm as anchor_norm
from .cost import Cost as Cost, build_cost as build_cost
from .editors import (
    EDITORS as EDITORS,
    EMMET as EMMET,
    MEMIT as MEMIT,
    ROME as ROME,
    AlphaEdit as AlphaEdit,
    ClosedFormEditor as ClosedFormEditor,
    Editor as Editor,
    EditorByRequest as EditorByRequest,
    MultEdit as MultEdit,
)
from .geometry import Geometry as Geometry, predict_geometry as predict_geometry
from .gradient import (
    GRADIENT_EDITORS as GRADIENT_EDITORS,
    GradientEditor as GradientEditor,
    GradientSession as GradientSession,
    StableEdit as StableEdit,
    UltraEdit as UltraEdit,
)
from .kept import leak_in_words as leak_in_words
from .null_space import null_space as null_space
from .problem import (
    Problem as Problem,
    Solution as Solution,
    contradictions as contradictions,
    reduced as reduced,
    solve as solve,
)
from .session import ClosedFormSession as ClosedFormSession
from .stream import (
    RunningStatistics as RunningStatistics,
    StreamStatistics as StreamStatistics,
    WeightStatistics as WeightStatistics,
)
