"""Operations on tensors. Nothing here knows a request, a model or a configuration."""
