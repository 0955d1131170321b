"""Windows of tokens of many networks, of whatever architecture, in memory or in files."""
