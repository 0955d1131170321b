"""Commands that put together what knows nothing of each other: what learns, and what is done with what it learned."""
