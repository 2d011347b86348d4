"""Numbers in sentences, and texts that cannot be encoded."""


def count(number: int, noun: str) -> str:
    """A number of things in English, with thousands separators: "1 window", "2,000 windows"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, which lone surrogates cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
