"""The exceptions that the command line reports as one sentence, each with an exit code of its own."""


class DanFastError(Exception):
    """A wrong path, file, setting or environment; the message is one sentence that names it and the remedy."""


class Interrupted(Exception):
    """The run was stopped by a signal and has been saved."""
