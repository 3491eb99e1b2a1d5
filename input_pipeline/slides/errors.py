"""What a slide raises."""


class SlideError(ValueError):
    """A slide, or a request made of it, that cannot be served; the message says what was seen and the way out."""


class UnsupportedFormatError(SlideError):
    """Sound as far as one can tell, but not for our own reader: OpenSlide may be asked. Never raised for damage."""
