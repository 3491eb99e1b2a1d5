"""What the XML of scanners says: channels and the size of a pixel. XML of strangers: no document types, no entities."""

from xml.etree import ElementTree

from input_pipeline.slides import mpp as scale
from input_pipeline.slides.errors import SlideError


def refuse_entities(text: str) -> None:
    """An entity can grow to gigabytes when it is expanded, and no scanner writes one."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise SlideError(
            "the image description is XML with a document type, which slides do not have; it is not parsed"
        )


def _root(text: str) -> ElementTree.Element | None:
    refuse_entities(text)
    try:
        return ElementTree.fromstring(text.strip().replace('encoding="utf-16"', "", 1))
    except (ElementTree.ParseError, ValueError):
        return None


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _find(root: ElementTree.Element | None, name: str) -> list[ElementTree.Element]:
    return [] if root is None else [element for element in root.iter() if _local(element) == name]


def _pixels(text: str) -> ElementTree.Element | None:
    return next(iter(_find(_root(text), "Pixels")), None)


def channel_names(text: str) -> list[str]:
    """One for each sample; '' where the file names none."""
    pixels = _pixels(text)
    if pixels is None:
        return []
    names: list[str] = []
    for channel in (child for child in pixels if _local(child) == "Channel"):
        samples = channel.get("SamplesPerPixel", "1")
        count = min(int(samples), 16) if samples.isdecimal() else 1
        name = channel.get("Name", "")
        names += [name] if count == 1 else [f"{name or 'sample'} {i}" for i in range(count)]
    return names


def physical_size(text: str) -> list[scale.Candidate]:
    pixels = _pixels(text)
    if pixels is None or "PhysicalSizeX" not in pixels.attrib:
        return []
    x, y = pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeY")
    unit_x = pixels.get("PhysicalSizeXUnit", "um")
    return scale.physical("ome", "OME PhysicalSizeX", x, y, unit_x, pixels.get("PhysicalSizeYUnit", unit_x))


def qptiff_name(text: str) -> str:
    """The stain of a channel: its biomarker where one is assigned, else its name."""
    root = _root(text)
    if root is None:
        return ""
    found = {_local(child): (child.text or "").strip() for child in root}
    return found.get("Biomarker") or found.get("Name") or ""


def leica_size(text: str, width: int, height: int) -> list[scale.Candidate]:
    """SCN gives the view of an image in nanometres."""
    for image in _find(_root(text), "image"):
        views, pixels = _find(image, "view"), _find(image, "pixels")
        if not views or not pixels or (pixels[0].get("sizeX"), pixels[0].get("sizeY")) != (str(width), str(height)):
            continue
        x, y = (_float(views[0].get(key)) for key in ("sizeX", "sizeY"))
        if x and y:
            return [scale.Candidate("vendor", x / 1000 / width, y / 1000 / height, "the Leica view")]
    return []


def philips_size(text: str) -> list[scale.Candidate]:
    """DICOM_PIXEL_SPACING, in mm, rows first."""
    for attribute in _find(_root(text), "Attribute"):
        if attribute.get("Name") == "DICOM_PIXEL_SPACING":
            values = [_float(value.strip('"')) for value in (attribute.text or "").split()]
            if len(values) == 2 and values[0] and values[1]:
                return [scale.Candidate("vendor", values[1] * 1000, values[0] * 1000, "the Philips pixel spacing")]
    return []


def _float(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
