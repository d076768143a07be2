"""What differs between architectures: a table of rows, and the module addresses that a row leads to."""
