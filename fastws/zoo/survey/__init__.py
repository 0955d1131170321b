"""What is in a zoo, in figures and on a page."""
