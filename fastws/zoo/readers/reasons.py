"""Why a state is left out of a zoo: every reason there is, in one list."""

REASONS = {
    "missing": "there is no such file",
    "unreadable": "the file is damaged, of another kind, or holds what is refused",
    "other architecture": "a tensor has another shape than in the file that set the architecture, or is not in it",
    "tensors missing": "a tensor of the file that set the architecture is not there",
    "other names": "the shapes are the same, but names do not say which tensor is which",
    "ties differ": "two tensors that are one in the file that set the architecture are not equal",
    "other dtype": "the zoo would have to round a tensor",
    "not finite": "a weight is NaN or infinite",
    "above threshold": "a weight is larger than --threshold",
}


class BadState(ValueError):
    """A state that cannot be used; ``reason`` is one of ``REASONS``, to count by."""

    def __init__(self, reason: str, details: str = ""):
        if reason not in REASONS:
            raise KeyError(reason)
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason
