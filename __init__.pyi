from . import (
    artefacts as artefacts,
    data as data,
    editing as editing,
    models as models,
    tracing as tracing,
    workflow as workflow,
)
from .data import EditRecord as EditRecord, EditRequest as EditRequest, Question as Question
from .editing import (
    EMMET as EMMET,
    MEMIT as MEMIT,
    ROME as ROME,
    AlphaEdit as AlphaEdit,
    Delta as Delta,
    EditError as EditError,
    History as History,
    MultEdit as MultEdit,
    evaluate as evaluate,
    load_edit as load_edit,
    second_moments as second_moments,
    to_peft as to_peft,
)
from .models import (
    ModelError as ModelError,
    Prompt as Prompt,
    Trace as Trace,
    TraceDict as TraceDict,
    VisionLanguageModel as VisionLanguageModel,
    capture as capture,
    load as load,
    patch as patch,
)
from .tracing import (
    BlankImage as BlankImage,
    Box as Box,
    CausalTrace as CausalTrace,
    Engine as Engine,
    ImageNoise as ImageNoise,
    MaskBoxes as MaskBoxes,
    ReplaceText as ReplaceText,
    SwapImage as SwapImage,
    TextNoise as TextNoise,
    TraceError as TraceError,
    attention_contributions as attention_contributions,
    attention_knockout as attention_knockout,
    average as average,
    causal_trace as causal_trace,
    logit_lens as logit_lens,
    predict_failure as predict_failure,
    prune_image_tokens as prune_image_tokens,
)
from .workflow import locate as locate, locate_then_edit as locate_then_edit

__version__: str
