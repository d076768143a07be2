from .addresses import (
    Addresses as Addresses,
    Key as Key,
    Kind as Kind,
    Site as Site,
    resolved as resolved,
)
from .discovery import discover as discover
from .projections import (
    ExpertProjection as ExpertProjection,
    Projection as Projection,
    RoutedExperts as RoutedExperts,
    slice_name as slice_name,
)
from .table import (
    PICTURE_FRONTS as PICTURE_FRONTS,
    TEXT_STACKS as TEXT_STACKS,
    Family as Family,
    Names as Names,
    PictureFront as PictureFront,
    Row as Row,
    TextStack as TextStack,
    family_of as family_of,
    has_front as has_front,
    has_rows as has_rows,
    pair_of as pair_of,
    picture_front_of as picture_front_of,
    text_stack_of as text_stack_of,
)
