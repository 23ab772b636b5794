"""What a user did wrong, in one line. The command line prints it and exits with 2."""


class UserError(Exception):
    """The message names the key, file or argument, and what would have been accepted."""
