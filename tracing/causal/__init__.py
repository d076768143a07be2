"""Causal tracing: corrupt the constraint or the picture, restore clean states, see which bring the answer back."""
