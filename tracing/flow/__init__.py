"""Attention edges that are cut, and image tokens that are dropped: which way the answer comes."""
