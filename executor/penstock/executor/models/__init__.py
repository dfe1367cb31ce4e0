"""Model families, their configuration and their weights."""
