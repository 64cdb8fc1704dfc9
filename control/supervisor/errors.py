"""What stops `cloudoptim up`, in one line a person can act on."""


class UpError(RuntimeError):
    """The start cannot go on; the message names the cause and the setting."""
