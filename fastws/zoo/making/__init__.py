"""Zoos made here: recipes, and many small networks trained at once."""
