"""Studies on the embedded model whose tables stand in the documentation; no commands, and not in the wheel."""
