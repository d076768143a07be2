"""What a trace found: frozen results of one prompt and of many, saved, exported and drawn."""
