"""A zoo, a SANE of its weights, a NeRN and a report, in minutes."""
