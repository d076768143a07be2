from .errors import ModelError as ModelError, NotFiniteError as NotFiniteError, ReplayError as ReplayError
from .families import FAMILIES as FAMILIES, Family as Family, Projection as Projection, Site as Site
from .frontend import open_images as open_images
from .hooks import Trace as Trace, TraceDict as TraceDict, capture as capture, patch as patch
from .loading.load import load as load
from .prompts import Patch as Patch, Prompt as Prompt, collate as collate
from .vlm import Score as Score, VisionLanguageModel as VisionLanguageModel
