"""Classes from a folder of the user's: each subfolder with images is one."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from metalit.data.classes.base import Classes, ClassSource
from metalit.data.classes.images import image_suffixes, read_image
from metalit.data.files import shown
from metalit.errors import InputError
from metalit.notices import say, warn

_OWNER = "data.tasks.source.folder"
_SILENCE = 10.0  # seconds


@dataclass(frozen=True)
class ImageFolder(ClassSource):
    """A folder with a subfolder of images for each class, or folders of such folders, as Omniglot's alphabets are.

    A class is called as its folder, ``alphabet/character`` where that is in another one; then the folders around
    classes are their groups, and splits hold groups whole. Images are read once, as
    :func:`~metalit.data.classes.images.read_image` reads them, and kept in 8 bits. Hidden files and those of other
    kinds are passed over.

    Args:
        folder: its name.
        size: height and width of what images are resized to, one number if both are equal.
        channels: 1 for grey, 3 for colours.

    Raises:
        InputError: from :meth:`read_classes`, with the way out: there is no such folder or no class in it; a folder
            without an image, or with images and folders; two names of one folder; an image that cannot be read.
    """

    folder: str
    size: int | tuple[int, int] = 84
    channels: int = 3

    def __post_init__(self) -> None:
        sides = [self.size] if isinstance(self.size, int) else list(self.size)
        if not (len(sides) <= 2 and all(side >= 1 for side in sides)):
            raise InputError(f"data.tasks.source.size={self.size} must be one whole number, or height and width")
        if self.channels not in (1, 3):
            raise InputError(f"data.tasks.source.channels={self.channels} must be 1 (grey) or 3 (colours)")

    def shape(self) -> Sequence[int]:
        """``[channels, height, width]``"""
        return [self.channels, *((self.size, self.size) if isinstance(self.size, int) else self.size)]

    def read_classes(self) -> Classes:
        """Find the classes, and read all images."""
        files = class_files(self.folder, _OWNER)
        paths = [path for members in files.values() for path in members]
        numbers = torch.tensor([number for number, members in enumerate(files.values()) for _ in members])
        values = read_images(paths, self.shape(), _OWNER)
        inside = all("/" in name for name in files)
        groups = [name.rpartition("/")[0] for name in files] if inside else None
        return Classes.of(list(files), numbers, values, groups)


def class_files(folder: str | Path, owner: str) -> dict[str, list[Path]]:
    """The image files of each class in a folder, both in alphabetical order.

    Raises:
        InputError: what :class:`ImageFolder` raises of folders.
    """
    return folder_files(folder, owner, False)[0]


def folder_files(folder: str | Path, owner: str, asks: bool) -> tuple[dict[str, list[Path]], list[Path]]:
    """The image files of each class in a folder, and those outside of its folders, all in alphabetical order.

    Args:
        folder: its name.
        owner: the argument that names it, for messages.
        asks: whether those outside are asked; else one line tells of them.

    Raises:
        InputError: what :class:`ImageFolder` raises of folders.
    """
    root = Path(folder)
    told = f"{owner}={shown(str(folder))}"
    if not root.is_dir():
        raise InputError(f"{told}: there is no such folder (looked in {Path.cwd()})")
    suffixes, passed = image_suffixes(), list[Path]()
    found, outside, real = dict[str, list[Path]](), list[Path](), dict[str, str]()
    for place, below, files in _walk(root, ()):
        images = [file for file in files if file.suffix.lower() in suffixes]
        passed += [file for file in files if file.suffix.lower() not in suffixes]
        if place == root:
            if not below:
                what = "holds images, but no folder" if images else "is empty"
                raise InputError(f"{told} {what}; make a subfolder for each class, with its images")
            outside = images
            if images and not asks:
                warn(
                    f"{told}: {len(images)} image(s) outside of its folders, such as {images[0].name!r}, have no class"
                )
            continue
        name = place.relative_to(root).as_posix()
        if images and below:
            raise InputError(f"{told}: the folder {name!r} holds images and folders; a class has images alone")
        if not images and not below:
            raise InputError(f"{told}: the folder {name!r} holds no image; add some or remove it")
        if images:
            other = real.setdefault(os.path.realpath(place), name)
            if other != name:
                raise InputError(f"{told}: the folders {other!r} and {name!r} are one, by a link; remove one of them")
            found[name] = images
    if passed:
        warn(f"{told}: {len(passed)} file(s) that are no images, such as {passed[0].name!r}, are passed over")
    return found, outside


def _walk(place: Path, above: tuple[str, ...]) -> Iterator[tuple[Path, list[Path], list[Path]]]:
    """Each folder with the folders and the files in it, links followed but in circles; hidden ones are left out."""
    above = (*above, os.path.realpath(place))
    with os.scandir(place) as entries:
        seen = [(entry.is_dir(), Path(entry.path)) for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    below = sorted(path for is_folder, path in seen if is_folder and os.path.realpath(path) not in above)
    yield place, below, sorted(path for is_folder, path in seen if not is_folder)
    for folder in below:
        yield from _walk(folder, above)


def read_images(paths: Sequence[Path], shape: Sequence[int], owner: str) -> np.ndarray:
    """Read images as :func:`~metalit.data.classes.images.read_image` does, several at once: ``[images, *shape]``."""
    values = np.empty((len(paths), *shape), dtype=np.uint8)
    due = time.monotonic() + _SILENCE
    with ThreadPoolExecutor() as pool:
        try:
            for number, pixels in enumerate(pool.map(partial(read_image, shape=shape, owner=owner), paths)):
                values[number] = pixels
                if time.monotonic() > due:
                    say(f"{number + 1:,} of {len(paths):,} images are read")
                    due += _SILENCE
        except InputError:
            pool.shutdown(cancel_futures=True)
            raise
    return values
