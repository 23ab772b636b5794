"""What ends a command without a traceback: a user's mistake (exit 2), broken numbers (70), a signal."""


class UserError(Exception):
    """The message names the key, file or argument, and what would have been accepted."""


class NumericalStop(Exception):
    """The numbers are broken: weights or gradients that are not finite, or far too large."""


class Interrupted(Exception):
    """A signal came while the engine was generating; no weight has changed since the last step."""
