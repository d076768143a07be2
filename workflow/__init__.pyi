from .located_edit import LocatedEdit as LocatedEdit, TraceShift as TraceShift, locate_then_edit as locate_then_edit
from .sites import Located as Located, locate as locate
