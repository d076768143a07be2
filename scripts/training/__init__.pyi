from .model import (
    IGNORED as IGNORED,
    IMAGE_TOKENS as IMAGE_TOKENS,
    Packer as Packer,
    make_model as make_model,
    make_processor as make_processor,
    make_tokenizer as make_tokenizer,
)
from .stages import Examples as Examples, forward as forward, pixels as pixels
from .train_tiny import (
    Route as Route,
    TrainTiny as TrainTiny,
    accuracy as accuracy,
    question_sets as question_sets,
    route as route,
    train_tiny as train_tiny,
)
