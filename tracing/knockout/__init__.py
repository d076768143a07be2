"""Attention knockout: cut attention between groups of tokens, window by window."""
