"""Tensors that decide what a layer does: what follows from them is found again only where something wrote to them."""


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


class LastSeen:
    """Tensors, and their versions, from which something was made: whether one was written to or replaced since."""

    def __init__(self):
        self.tensors, self.versions = (), ()

    def is_current(self, tensors):
        same = len(tensors) == len(self.tensors) and all(a is b for a, b in zip(tensors, self.tensors, strict=True))
        return same and self.versions == _versions(tensors)

    def remember(self, tensors):
        self.tensors, self.versions = tuple(tensors), _versions(tensors)


def _versions(tensors):
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)
