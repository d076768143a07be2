from .card import Examination as Examination, model_card as model_card, score_tables as score_tables
from .examination import Examine as Examine, Questions as Questions, examine_model as examine_model
from .original import Sentence as Sentence, open_original as open_original
from .pictures import Pool as Pool, make_pool as make_pool
from .recipe import Recipe as Recipe
from .student import (
    Block as Block,
    PackedRows as PackedRows,
    Student as Student,
    make_student as make_student,
)
from .train import FlagsTraining as FlagsTraining, examine_run as examine_run, train_flags as train_flags
