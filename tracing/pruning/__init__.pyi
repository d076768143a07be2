from .pruning import Drop as Drop, Ids as Ids, Limits as Limits, image_ranks as image_ranks, verified as verified
from .result import operations_kept as operations_kept, tokens_kept as tokens_kept
