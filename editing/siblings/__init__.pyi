from .names import other_subjects as other_subjects
from .siblings import (
    TEMPLATES as TEMPLATES,
    SiblingFinder as SiblingFinder,
    Siblings as Siblings,
    SiblingSet as SiblingSet,
)
