"""What came of cutting edges and dropping tokens: single questions, averages, and their drawings."""
