from .corruption import CONSTRAINTS as CONSTRAINTS
from .noise import LADDER as LADDER, Noise as Noise
from .parsing import SPELLINGS as SPELLINGS
