"""Text to token ids and back: templates, encoding, incremental decoding, stop strings."""
