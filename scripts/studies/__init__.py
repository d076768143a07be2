"""What makes the documentation: studies on the embedded model for its tables, the reference and the example files.

Nothing of it is a command, and it is not in the wheel.
"""
