"""The batch that lives on the device: one arena of words, changed by differences."""
