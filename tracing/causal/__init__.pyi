from .trace import DIRECTIONS as DIRECTIONS
