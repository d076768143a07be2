from .build import (
    IMAGE_TOKENS as IMAGE_TOKENS,
    make_model as make_model,
    make_processor as make_processor,
    make_tokenizer as make_tokenizer,
)
from .examination import Route as Route, accuracy as accuracy, question_sets as question_sets, route as route
from .joint import Examples as Examples, forward as forward
from .packing import IGNORED as IGNORED, Packer as Packer
from .tower import pixels as pixels
