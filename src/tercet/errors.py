"""What the user is told when the input cannot be used."""


class InputError(ValueError):
    """A mistake that the user can mend: what was got, where, what is accepted, which key to change.

    The entries print the message alone and leave with exit code 1; ``TERCET_DEBUG=1`` adds the traceback.
    """
