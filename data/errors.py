"""The error of the data rooms."""


class DataError(ValueError):
    """A record, file or choice of records that cannot be used; the message says what was found and can be done."""
