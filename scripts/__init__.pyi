from . import (
    answer as answer,
    bench as bench,
    build_flags as build_flags,
    compare as compare,
    data as data,
    demo as demo,
    doctor as doctor,
    edit as edit,
    evaluate as evaluate,
    export as export,
    families as families,
    fetch_smollm2 as fetch_smollm2,
    flow as flow,
    merge as merge,
    moments as moments,
    trace as trace,
    train_flags as train_flags,
    undo as undo,
)
from .door import available_cores as available_cores, be_polite as be_polite
from .edit_options import (
    NAMES as NAMES,
    NEXT as NEXT,
    RequestOptions as RequestOptions,
    edit_rows as edit_rows,
    editor as editor,
    parse_place as parse_place,
    read_general as read_general,
    request_of as request_of,
    variants as variants,
)
from .options import CommandError as CommandError
