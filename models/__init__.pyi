from .errors import ModelError as ModelError, NotFiniteError as NotFiniteError, ReplayError as ReplayError
from .families import (
    PICTURE_FRONTS as PICTURE_FRONTS,
    TEXT_STACKS as TEXT_STACKS,
    ExpertProjection as ExpertProjection,
    Family as Family,
    PictureFront as PictureFront,
    Projection as Projection,
    Site as Site,
    TextStack as TextStack,
)
from .frontend import open_images as open_images
from .generation import Continuation as Continuation, Score as Score
from .hooks import Trace as Trace, TraceDict as TraceDict, capture as capture, patch as patch
from .loading.load import load as load
from .prompts import Patch as Patch, Prompt as Prompt, batches as batches, collate as collate
from .vlm import VisionLanguageModel as VisionLanguageModel
