"""What the command line answers with a sentence and an exit code of its own."""


class DanFastError(Exception):
    """A wrong path, file, setting or environment; the message is one sentence that names it and the remedy."""


class Interrupted(Exception):
    """The run was asked to stop; it has been saved."""
