"""New networks from codes or from weights: ``fastws sample``."""
