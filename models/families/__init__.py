"""What differs between model families: a table of rows, and the addresses that a row gives."""
