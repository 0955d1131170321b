"""Benchmarks, installed as fastws.benchmarks; ``fastws bench`` runs them, and so does ``pytest benchmarks``."""
