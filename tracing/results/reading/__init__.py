"""What single runs have shown: emergence, contributions, failure, relevance, and their averages and drawings."""
