"""The one exception that the command line turns into a line of text and exit status 2."""


class UserError(Exception):
    """Something the user can mend; the message is one clear line that says what and how."""
