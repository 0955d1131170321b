"""Autoencoders of whole networks: their options, the views they see, and their training."""
