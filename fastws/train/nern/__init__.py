"""NeRN's trainer: its options, its setting and its steps."""
