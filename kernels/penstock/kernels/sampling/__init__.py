"""From logits to token ids: filters, noise, choice."""
