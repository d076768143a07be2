from .keys import (
    Goal as Goal,
    Lookup as Lookup,
    Place as Place,
    TargetBatch as TargetBatch,
    end_ids as end_ids,
    key_positions as key_positions,
    keys_and_values as keys_and_values,
    lookups as lookups,
    prompt_end as prompt_end,
    target_batch as target_batch,
)
from .search import ValueResult as ValueResult, ValueSettings as ValueSettings, search_values as search_values
