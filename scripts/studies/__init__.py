"""Programs that make the documentation: the tables of results on the embedded model, the reference, example files.

None of them is a command of multrace, and they are not in the wheel.
"""
