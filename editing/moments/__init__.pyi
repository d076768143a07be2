from .collect import memory_of_moments as memory_of_moments, second_moments as second_moments
from .moments import KINDS as KINDS, PROBES as PROBES, Moments as Moments, Watch as Watch
