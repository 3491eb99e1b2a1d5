"""Files that are either whole or not there."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document, indent=1, default=str).encode())


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The document, or ValueError naming the file and `what` it should have been."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path} ({what})") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} ({what}) is not readable: {error}") from error
