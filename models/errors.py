"""The one exception that every package raises for bad input; it stands alone so that samplers need no torch."""


class InputError(Exception):
    """Something that the user can mend: a script prints the message as one line and exits with 2."""


class OneProcessError(InputError):
    """One that may concern a single process of several: whichever meets it prints it, not the first alone."""
