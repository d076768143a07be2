from .analysis import (
    INPUT_ERRORS as INPUT_ERRORS,
    Analysis as Analysis,
    Outcome as Outcome,
    RunContext as RunContext,
    RunningAverage as RunningAverage,
    RunReport as RunReport,
    Summary as Summary,
    Task as Task,
    question_of_record as question_of_record,
    read_rows as read_rows,
)
from .costs import read_cost as read_cost
from .edit_outcome import EditOutcome as EditOutcome, Place as Place
from .edit_run import (
    CANDIDATES as CANDIDATES,
    SITES as SITES,
    EditRun as EditRun,
    EditTrace as EditTrace,
    load_traces as load_traces,
)
from .evaluate_run import (
    EvaluateBatchRun as EvaluateBatchRun,
    EvaluateRun as EvaluateRun,
)
from .evaluate_sequence import EvaluateSequenceRun as EvaluateSequenceRun
from .flow_run import (
    FlowAnswer as FlowAnswer,
    FlowRun as FlowRun,
    noise_for_errors as noise_for_errors,
    with_noise as with_noise,
)
from .joined_runs import compare as compare, merge as merge
from .located_edit import (
    Located as Located,
    LocatedEdit as LocatedEdit,
    TraceShift as TraceShift,
    locate as locate,
    locate_then_edit as locate_then_edit,
)
from .model_cache import (
    CachedModel as CachedModel,
    build_flags as build_flags,
    cache_folder as cache_folder,
    cached_model as cached_model,
    fetch_smollm2 as fetch_smollm2,
    origin_of as origin_of,
)
from .run_folder import (
    RunError as RunError,
    Shard as Shard,
    StoredRecord as StoredRecord,
    check_result_folder as check_result_folder,
    result_folder as result_folder,
)
from .runs import ModelToLoad as ModelToLoad, run as run
from .site_choice import choose_site as choose_site
from .trace_run import (
    PlaceTrace as PlaceTrace,
    TraceRun as TraceRun,
    other_pictures as other_pictures,
    trace_summary as trace_summary,
)
