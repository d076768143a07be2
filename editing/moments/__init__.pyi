from .collect import memory_of_moments as memory_of_moments, second_moments as second_moments
from .moments import KINDS as KINDS, PROBES as PROBES, Moments as Moments, Watch as Watch
from .own import MomentSource as MomentSource, OwnMoments as OwnMoments, own_moments as own_moments
from .samples import (
    own_prompts as own_prompts,
    pictures_of_requests as pictures_of_requests,
    pictures_to_ask_about as pictures_to_ask_about,
)
