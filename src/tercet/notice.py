"""What a user should know, said once."""

import logging
from functools import cache


@cache
def say_once(message: str) -> None:
    """Log a warning; rows are read and evaluators run many times, the same message is not repeated."""
    logging.getLogger("tercet").warning(message)
