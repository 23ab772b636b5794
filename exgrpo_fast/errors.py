"""What ends a command without a traceback: a user's mistake (exit 2), and broken numbers (70)."""


class UserError(Exception):
    """The message names the key, file or argument, and what would have been accepted."""


class NumericalStop(Exception):
    """The numbers are broken: weights or gradients that are not finite, or far too large."""
