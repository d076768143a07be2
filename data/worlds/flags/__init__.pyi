from .countries import Country as Country, flag_of as flag_of, read_countries as read_countries
from .questions import (
    PHRASES as PHRASES,
    RELATIONS as RELATIONS,
    SHARED_RELATIONS as SHARED_RELATIONS,
    SIDES as SIDES,
    CountryRelation as CountryRelation,
    answer_of as answer_of,
    begins_with as begins_with,
    relation_named as relation_named,
)
from .records import flag_questions as flag_questions, flag_records as flag_records, write_flags as write_flags
from .splits import (
    HALVES as HALVES,
    KNOWN as KNOWN,
    LONG_TAIL as LONG_TAIL,
    SPLITS as SPLITS,
    WRONG as WRONG,
    SplitRow as SplitRow,
    read_splits as read_splits,
    split_rows as split_rows,
    write_splits as write_splits,
)
from .world import CountryFact as CountryFact, FlagWorld as FlagWorld, generator_of as generator_of
