"""Opening a model: where its files are, which device takes it, and the proof that its addresses are right."""
