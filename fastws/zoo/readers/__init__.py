"""Readers: other people's populations of networks as zoo folders. Nothing in their files is ever executed."""
