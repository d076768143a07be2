from .attending import (
    Attention as Attention,
    attending as attending,
)
from .attention import (
    Kernels as Kernels,
    Segment as Segment,
    Softmax as Softmax,
    merged_attention as merged_attention,
    portable as portable,
    probe_kernels as probe_kernels,
    whole_attention as whole_attention,
)
from .observe import (
    attention_function as attention_function,
    masking as masking,
)
from .recording import (
    Cut as Cut,
    Index as Index,
    Masks as Masks,
    Recording as Recording,
    Source as Source,
    Span as Span,
    index_of as index_of,
    neighbours as neighbours,
    places as places,
)
from .replay import Replay as Replay, replaying as replaying
from .upper import PaddedBatch as PaddedBatch, UpperLayers as UpperLayers
