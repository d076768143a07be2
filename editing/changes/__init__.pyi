from .adapters import VLLM_RANKS as VLLM_RANKS, ExportedAdapter as ExportedAdapter, to_peft as to_peft
from .delta import Delta as Delta, RuntimeEdit as RuntimeEdit, compose as compose, requests_line as requests_line
from .delta_session import DeltaSession as DeltaSession
from .exports import (
    CastVerification as CastVerification,
    Verification as Verification,
    save_merged as save_merged,
    verify_export as verify_export,
    with_adapters as with_adapters,
)
from .history import (
    INDEX as INDEX,
    History as History,
    HistoryEntry as HistoryEntry,
    load_edit as load_edit,
)
from .truncation import (
    Directions as Directions,
    leading_directions as leading_directions,
    truncate as truncate,
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
