"""SANE: its options, the windows it is trained on, its losses, and its training."""
