"""HTML and SVG from calls: text is escaped unless it was built here, so a slide's name cannot become markup."""

import html

VOID = frozenset({"br", "hr", "img", "meta", "link"})


class Html(str):
    """Markup that is already escaped."""


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """tag('a', 'text', class_='x', aria_label='y'); None among children or attributes is left out. Well-formed XML."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{shown} />")
    return Html(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    return Html("".join(escape(child) for child in children if child is not None))
