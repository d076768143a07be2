from .load import check_in_memory as check_in_memory
from .proof import prove_addresses as prove_addresses
