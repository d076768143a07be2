from . import (
    answer as answer,
    bench as bench,
    data as data,
    demo as demo,
    export as export,
    moments as moments,
    undo as undo,
)
from .door import available_cores as available_cores, be_polite as be_polite
from .edit_asked import (
    NEXT as NEXT,
    asked_edits as asked_edits,
    read_edits as read_edits,
    read_general as read_general,
)
from .edit_preview import preview as preview, sizes as sizes
from .edit_where import Place as Place, parse_place as parse_place
from .editors import BASELINES as BASELINES, editor as editor
from .errors import CommandError as CommandError
from .examples import write_examples as write_examples
from .flow_analyses import check_settings as check_settings, readings_of as readings_of
from .flow_degraded import degraded_questions as degraded_questions
from .flow_files import write_files as write_files
from .flow_knockout import Knockout as Knockout
from .flow_questions import (
    FlowQuestion as FlowQuestion,
    read_questions as read_questions,
    world_questions as world_questions,
)
from .reference import PAGE as PAGE
from .verification import probe_records as probe_records, scores as scores, summary as summary, verify as verify
