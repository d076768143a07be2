from .prediction import Readings as Readings, best_window as best_window, held_out_scores as held_out_scores
from .result import roc_curve as roc_curve
