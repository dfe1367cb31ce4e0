"""The side of the executor that owns tensors: slots, pages, the model, sampling."""
