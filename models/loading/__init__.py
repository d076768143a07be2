"""Opening a model: its files, its device, its processor, and the proof of its addresses."""
