from .corruption import CONSTRAINTS as CONSTRAINTS
from .kinds import LADDER as LADDER, SPELLINGS as SPELLINGS, Noise as Noise
