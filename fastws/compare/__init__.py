"""Two networks, or a folder of them: aligned, merged, and told apart."""
