"""The one exception that a user of Andromeda is meant to read."""


class AndromedaError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do.

    The command line prints it on one line and exits with code 2.
    """
