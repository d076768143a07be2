"""Worlds of real things: facts with open sources, and their pictures. Each folder is one world."""
