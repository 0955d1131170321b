"""What foretells properties of networks: features, probes that are fitted to them, and how sure their scores are."""
