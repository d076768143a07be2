from .averages import (
    Averager as Averager,
    Mean as Mean,
    RunningMean as RunningMean,
    auroc as auroc,
    averaged as averaged,
    bootstrap_counts as bootstrap_counts,
    mean_interval as mean_interval,
    student_interval as student_interval,
    weighted_auroc as weighted_auroc,
    wilson_interval as wilson_interval,
)
from .files import (
    LAYOUT as LAYOUT,
    digest as digest,
    read_json as read_json,
    read_tensors as read_tensors,
    write_json as write_json,
    write_tensors as write_tensors,
)
from .folders import (
    ArtefactError as ArtefactError,
    cache_folder as cache_folder,
    one_at_a_time as one_at_a_time,
    remove_leftovers as remove_leftovers,
    replacing as replacing,
    replacing_files as replacing_files,
    replacing_folder as replacing_folder,
    write_whole as write_whole,
)
from .results import (
    Result as Result,
    from_plain as from_plain,
    load_fields as load_fields,
    plain_fields as plain_fields,
    save_fields as save_fields,
)
