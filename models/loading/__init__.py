"""Opening a model: where its files are, which device holds it, how its processor fits, and the proof of its addresses."""
