"""Tracing and editing together: locate where a fact is kept, then edit there."""
