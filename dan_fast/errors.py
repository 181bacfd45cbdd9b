"""The one exception for mistakes a user can mend: the command line prints its sentence and exits with 1."""


class DanFastError(Exception):
    """A wrong path, file, setting or environment; the message is one sentence that names it and the remedy."""
