"""How the embedded model was made: its parts, its two training stages and its examination."""
