"""Counted random numbers: every draw is a function of seed and offset, the same on all devices."""
