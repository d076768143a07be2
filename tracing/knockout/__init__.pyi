from .knockout import (
    PAPER_FLOWS as PAPER_FLOWS,
    Flow as Flow,
    Groups as Groups,
    attention_knockout as attention_knockout,
    parse_flow as parse_flow,
)
from .result import (
    AttentionKnockout as AttentionKnockout,
    AverageKnockout as AverageKnockout,
    centre_of_loss as centre_of_loss,
)
