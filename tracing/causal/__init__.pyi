from .trace import (
    DIRECTIONS as DIRECTIONS,
    estimated_changes as estimated_changes,
    rank_agreement as rank_agreement,
)
