"""The engine under all experiments: cells, plans, the fast sweep and the plain oracle."""
