"""What sampled networks are worth: ``fastws zoo compare``."""
