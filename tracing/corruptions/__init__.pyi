from .noise import LADDER as LADDER, Noise as Noise
from .parsing import SPELLINGS as SPELLINGS
from .words import CONSTRAINTS as CONSTRAINTS
