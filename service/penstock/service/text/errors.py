"""What can go wrong between text and token ids. Messages are fit for the caller and quote no prompt."""


class TextError(Exception):
    """Any failure of this package that has a name."""


class TokenizerFilesError(TextError):
    """The tokenizer's files are missing, too large or unreadable: the model's fault, not the caller's."""


class TemplateError(TextError):
    """The chat template cannot be compiled, or failed on this conversation, or ran past one of its bounds."""


class TemplateRefused(TemplateError):
    """The chat template itself rejected the conversation through `raise_exception`."""


class PromptTooLong(TextError):
    """The text cannot fit the token limit, whatever its tokens turn out to be; it was not tokenized."""

    def __init__(self, chars: int, max_chars: int) -> None:
        super().__init__(f"the prompt has {chars} characters, more than the {max_chars} that can possibly fit")
        self.chars = chars
        self.max_chars = max_chars


class Busy(TextError):
    """The encoding queue is full, or closing; nothing was done and the caller may try again."""
