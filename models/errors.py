"""The error of bad input data: one line that says what is wrong, the value, the limit and what to do."""


class DataError(ValueError):
    """Input data that the models refuse to work with; the message is one line and never contains a row's values."""
