"""Decoder layers run again from any layer on, for only the positions that can have changed."""
