"""Files that are either whole or not there."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to, which gets its real name when all went well and the bytes are on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    with whole(path) as part:
        part.write_bytes(data)


def save_picture(path: str | os.PathLike, picture: np.ndarray) -> None:
    """uint8 [H, W, 3] as PNG or JPEG, by the suffix."""
    format = Image.registered_extensions()[Path(path).suffix]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format, **({"quality": 88, "subsampling": 0} if format == "JPEG" else {}))
    write_atomically(path, buffer.getvalue())


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike, document: Any) -> None:
    write_atomically(path, json.dumps(document, indent=1, default=str).encode())


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The document, or ValueError naming the file and `what` it should have been."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path} ({what})") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} ({what}) is not readable: {error}") from error
