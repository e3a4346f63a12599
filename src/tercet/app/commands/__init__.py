"""One module per command of ``tercet``."""
