from .logit_lens import QUANTITIES as QUANTITIES, AverageLogitLens as AverageLogitLens
from .result import (
    NORMS as NORMS,
    FollowedTokens as FollowedTokens,
    LogitLens as LogitLens,
    state_name as state_name,
    token_text as token_text,
)
