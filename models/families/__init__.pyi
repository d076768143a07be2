from .addresses import Addresses as Addresses
from .table import FAMILIES as FAMILIES, Family as Family, family_of as family_of
