from .endings import LONGEST_ANSWER as LONGEST_ANSWER, ending_of as ending_of, ends_by_itself as ends_by_itself
from .gradients import AnswerGradients as AnswerGradients, answer_gradients as answer_gradients
from .keys import (
    Goal as Goal,
    Goals as Goals,
    Lookup as Lookup,
    Place as Place,
    PlainGoal as PlainGoal,
    TargetBatch as TargetBatch,
    check_goals as check_goals,
    end_ids as end_ids,
    goals_of as goals_of,
    key_positions as key_positions,
    keys_and_values as keys_and_values,
    lookups as lookups,
    prompt_end as prompt_end,
    target_batch as target_batch,
)
from .search import (
    RequestValues as RequestValues,
    ValueResult as ValueResult,
    ValueSettings as ValueSettings,
    search_values as search_values,
)
