from .check import (
    FINDINGS as FINDINGS,
    CheckReport as CheckReport,
    Finding as Finding,
    check_data as check_data,
)
from .convert import FORMS as FORMS, ConvertReport as ConvertReport, convert_data as convert_data
from .errors import DataError as DataError
from .facts import (
    EditRecord as EditRecord,
    EditRequest as EditRequest,
    Probe as Probe,
    Question as Question,
    questions_of as questions_of,
    with_template as with_template,
)
from .formats import (
    FORMATS as FORMATS,
    detect_format as detect_format,
    read_data as read_data,
    read_records as read_records,
)
from .jsonl import (
    parse_json as parse_json,
    read_lines as read_lines,
    schema as schema,
    write_lines as write_lines,
)
from .pictures import (
    PictureFacts as PictureFacts,
    inspect_picture as inspect_picture,
    megapixel_limit as megapixel_limit,
    read_pictures as read_pictures,
)
from .spans import find_span as find_span, find_spans as find_spans
from .world import (
    EditCase as EditCase,
    Fact as Fact,
    World as World,
    WorldRequests as WorldRequests,
    another_picture as another_picture,
    tiny_vlm_path as tiny_vlm_path,
    untouched_facts as untouched_facts,
    world_questions as world_questions,
    world_records as world_records,
)
from .worlds.flags import (
    FlagWorld as FlagWorld,
    flag_questions as flag_questions,
    flag_records as flag_records,
    write_flags as write_flags,
)
