"""Small tensors that decide what a layer does: their values are read again only where something wrote to them."""


def is_free_to_read(t):
    """Whether the value of a tensor is there without a wait for its device."""
    return t.is_cpu


class LastRead:
    """The tensor, and its version, whose value a layer knows. On a device, a write through `.data` goes unnoticed."""

    def __init__(self):
        self.tensor = self.version = None

    def is_current(self, t):
        """Whether the value of t still is the one that was remembered; False where reading it costs nothing."""
        return self.tensor is t and self.version == t._version

    def remember(self, t):
        if not is_free_to_read(t):
            self.tensor, self.version = t, t._version
