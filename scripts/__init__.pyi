from . import (
    answer as answer,
    bench as bench,
    compare as compare,
    data as data,
    demo as demo,
    edit as edit,
    evaluate as evaluate,
    export as export,
    flow as flow,
    merge as merge,
    moments as moments,
    trace as trace,
    undo as undo,
)
from .door import available_cores as available_cores, be_polite as be_polite
from .edit_requests import (
    NEXT as NEXT,
    RequestOptions as RequestOptions,
    edit_rows as edit_rows,
    parse_place as parse_place,
    read_general as read_general,
    request_of as request_of,
    variants as variants,
)
from .editors import NAMES as NAMES, editor as editor
from .options import CommandError as CommandError
from .reference import PAGE as PAGE, write_examples as write_examples
