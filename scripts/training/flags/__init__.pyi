from .card import model_card as model_card, score_tables as score_tables
from .examine import Examination as Examination, Examine as Examine, Questions as Questions, examine as examine
