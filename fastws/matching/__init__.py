"""Networks brought into one order of their neurons."""
