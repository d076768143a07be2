from .contributions import (
    attention_contributions as attention_contributions,
    contribution_norms as contribution_norms,
    contribution_vectors as contribution_vectors,
    projected_values as projected_values,
    record_attention as record_attention,
    value_bias as value_bias,
)
from .contributions_result import index_shares as index_shares, tokens_for_share as tokens_for_share
