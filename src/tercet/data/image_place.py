"""Where images are."""

from pathlib import Path

from tercet.data.place import Place, find
from tercet.error import InputError
from tercet.notice import say_once
from tercet.paths import locate

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
IMAGE = ("image", "img", "picture", "photo", "face", "pixels")
LABEL = ("label", "identity", "person", "class", "target", "category", "name")
ACCEPTED = "a folder root/label/file, .parquet files with an image column, or a hub id (owner/name)"


def find_images(path: str) -> Place:
    """What ``data.path`` names: of kind "folder" (``files`` are its root and the images), parquet or hub.

    Raises:
        InputError: there is no such thing, or nothing in it is an image.
    """
    here = locate(path)
    if here.is_dir():
        files = sorted(f for f in here.rglob("*") if f.is_file() and not _hidden(f, here))
        images = [f for f in files if f.suffix.lower() in ENDINGS]
        if images:
            if others := len(files) - len(images):
                say_once(f"data.path={path}: {others} of {len(files)} files are no images by their names; left out.")
            return Place(path, "folder", (here, *images))
        if not any(f.suffix.lower() == ".parquet" for f in files):
            raise InputError(f"data.path={path}: no image among {len(files)} files. data.path takes {ACCEPTED}.")
    place = find(path)
    if place.kind not in ("parquet", "hub"):
        raise InputError(f"data.path={path} is of kind {place.kind}. For images data.path takes {ACCEPTED}.")
    return place


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)
