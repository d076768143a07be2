from .delta import Delta as Delta, RuntimeEdit as RuntimeEdit, compose as compose, requests_line as requests_line
from .delta_session import DeltaSession as DeltaSession
from .exports import (
    Verification as Verification,
    save_merged as save_merged,
    to_peft as to_peft,
    verify_export as verify_export,
    with_adapters as with_adapters,
)
from .history import (
    INDEX as INDEX,
    History as History,
    HistoryEntry as HistoryEntry,
    load_edit as load_edit,
)
from .weight_change import (
    NO_OWNER as NO_OWNER,
    AppliedDelta as AppliedDelta,
    Change as Change,
    EditSession as EditSession,
    WeightChange as WeightChange,
    held as held,
    overwrite as overwrite,
    write as write,
)
