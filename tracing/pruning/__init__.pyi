from .dropping import Drop as Drop, image_ranks as image_ranks
from .greedy import Ids as Ids, Limits as Limits, verified as verified
from .result import operations_kept as operations_kept, tokens_kept as tokens_kept
