"""The one error of this room."""


class Refused(Exception):
    """A refusal: something would leak, be weaker than asked, or is damaged. One line: what, value, limit, what to do.

    The message is safe to log and to send to other parties: it never holds a secret or a row's content.
    """
