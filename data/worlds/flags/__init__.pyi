from .countries import Country as Country, flag_of as flag_of, read_countries as read_countries
from .questions import (
    PHRASES as PHRASES,
    RELATIONS as RELATIONS,
    SIDES as SIDES,
    CountryRelation as CountryRelation,
    answer_of as answer_of,
    begins_with as begins_with,
    is_definite as is_definite,
    relation_named as relation_named,
)
