"""Folders of pictures as people have them, and what is told of those that cannot be used."""

import numpy as np
import pytest
import torch
from csv_files import told
from picture_folders import omniglot_like
from PIL import Image

from metalit.data import ClassTasks, Episodes, ImageFolder, TaskDataModule, read_image
from metalit.data.classes import image_folder
from metalit.errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
LUMA = {RED: 76, GREEN: 150, BLUE: 29}  # 0.299 R + 0.587 G + 0.114 B


def saved(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (4, 4), RED)).save(path, **options)
    return path


def corners(colours=(RED, GREEN, BLUE, WHITE), side=8, mode="RGB"):
    """Four squares of one colour each: upper left, upper right, lower left, lower right."""
    image = Image.new(mode, (2 * side, 2 * side))
    for number, colour in enumerate(colours):
        image.paste(
            colour, (number % 2 * side, number // 2 * side, number % 2 * side + side, number // 2 * side + side)
        )
    return image


def colours(pixels):
    """The colour in the middle of each quarter."""
    _, height, width = pixels.shape
    return [tuple(pixels[:, h, w].tolist()) for h in (height // 4, -height // 4) for w in (width // 4, -width // 4)]


# --- one image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "ppm", "webp"])
def test_colours_are_read_in_every_format(tmp_path, suffix):
    file = saved(tmp_path / f"a.{suffix}", corners(), **({"lossless": True} if suffix == "webp" else {}))
    pixels = read_image(file, [3, 16, 16])
    assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 16, 16))
    assert colours(pixels) == [RED, GREEN, BLUE, WHITE]
    grey = read_image(file, [1, 16, 16])
    assert colours(grey) == [(LUMA[RED],), (LUMA[GREEN],), (LUMA[BLUE],), (255,)]


def test_an_image_is_resized_to_height_and_width(tmp_path):
    file = saved(tmp_path / "a.png", corners(side=40))
    assert colours(read_image(file, [3, 8, 12])) == [RED, GREEN, BLUE, WHITE]
    assert read_image(file, [1, 8, 12]).shape == (1, 8, 12)
    half = np.kron(np.array([[0, 200]]), np.ones((32, 1))).astype(np.uint8).repeat(16, 1)[:, ::-1]
    stripes = np.tile(np.array([0, 200], dtype=np.uint8), (32, 16))
    assert (
        read_image(saved(tmp_path / "s.png", Image.fromarray(stripes)), [1, 4, 4])[0, 1:3, 1:3].tolist()
        == [[100] * 2] * 2
    )
    assert read_image(saved(tmp_path / "h.png", Image.fromarray(half)), [1, 1, 2]).flatten().argmax() == 0


def test_a_large_jpeg_is_the_same_as_others(tmp_path):
    file = saved(tmp_path / "a.jpg", corners(side=400), quality=95)
    found = np.array(colours(read_image(file, [3, 28, 28])))
    assert abs(found - np.array([RED, GREEN, BLUE, WHITE])).max() <= 3


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    wide = Image.new("RGB", (24, 12), RED)
    wide.paste(BLUE, (12, 0, 24, 12))
    pixels = read_image(saved(tmp_path / "a.png", wide, exif=exif), [3, 8, 8])
    assert colours(pixels) == [RED, RED, BLUE, BLUE]


def test_palettes_are_colours(tmp_path):
    file = saved(tmp_path / "a.png", corners().quantize(4))
    assert Image.open(file).mode == "P"
    assert colours(read_image(file, [3, 8, 8])) == [RED, GREEN, BLUE, WHITE]


def test_what_is_transparent_is_white(tmp_path):
    clear = [(*RED, 255), (*RED, 0), (0, 0, 0, 128), (0, 0, 0, 0)]
    file = saved(tmp_path / "a.png", corners(clear, mode="RGBA"))
    assert colours(read_image(file, [3, 16, 16])) == [RED, WHITE, (127, 127, 127), WHITE]
    grey = saved(tmp_path / "b.png", corners([(0, 255), (0, 0), (100, 255), (100, 0)], mode="LA"))
    assert colours(read_image(grey, [1, 16, 16])) == [(0,), (255,), (100,), (255,)]
    palette = corners().quantize(4)
    first = palette.getpixel((0, 0))
    pixels = read_image(saved(tmp_path / "c.png", palette, transparency=first), [3, 8, 8])
    assert colours(pixels) == [WHITE, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_of_grey_keep_their_upper_8(tmp_path, suffix):
    values = np.array([[0, 256 * 7 + 255], [256 * 200, 65535]], dtype=np.uint16)
    file = saved(tmp_path / f"a.{suffix}", Image.fromarray(values.repeat(8, 0).repeat(8, 1)))
    assert colours(read_image(file, [1, 16, 16])) == [(0,), (7,), (200,), (255,)]
    assert colours(read_image(file, [3, 16, 16])) == [(v,) * 3 for v in (0, 7, 200, 255)]


def test_images_of_1_bit_and_of_print_are_read(tmp_path):
    bits = saved(tmp_path / "a.png", corners().convert("L").point(lambda value: 255 * (value > 100)).convert("1"))
    assert colours(read_image(bits, [1, 16, 16])) == [(0,), (255,), (0,), (255,)]
    ink = read_image(saved(tmp_path / "a.tif", corners().convert("CMYK")), [3, 16, 16])
    assert colours(ink) == [RED, GREEN, BLUE, WHITE]


def test_images_that_cannot_be_read_are_told(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    told(lambda: read_image(text, [1, 8, 8]), f"image={str(text)!r} is no image that can be read (of no format", "mend")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "bmp", "gif"):
        file = saved(tmp_path / f"cut.{suffix}", Image.fromarray(noise))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        told(
            lambda file=file: read_image(file, [1, 8, 8], "data.x"),
            f"data.x={str(file)!r} is no image that can be read",
        )
    told(lambda: read_image(tmp_path / "none.png", [1, 8, 8]), "there is no such file")


def test_pixels_beyond_16_bits_are_told(tmp_path):
    real = saved(tmp_path / "a.tif", Image.fromarray(np.zeros((4, 4), dtype=np.float32)))
    told(lambda: read_image(real, [1, 8, 8]), f"image={str(real)!r} has pixels that are no whole numbers", "save it")
    deep = saved(tmp_path / "b.tif", Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)))
    told(lambda: read_image(deep, [1, 8, 8]), "more than 16 bits")


# --- folders --------------------------------------------------------------------------------------------------------


def test_each_folder_is_a_class(tmp_path):
    for name, colour in (("dogs", RED), ("cats", BLUE)):
        for number in range(3):
            saved(tmp_path / name / f"{number}.png", Image.new("RGB", (5, 9), colour))
    classes = ImageFolder(str(tmp_path), size=(6, 4)).read_classes()
    assert (classes.names, classes.groups, classes.columns) == (["cats", "dogs"], None, ["red", "green", "blue"])
    assert (classes.values.shape, classes.values.dtype) == ((6, 3, 6, 4), np.uint8)
    for number, colour in enumerate((BLUE, RED)):
        rows = classes.rows[classes.start[number] : classes.start[number + 1]]
        assert {tuple(pixels) for pixels in classes.values[rows].mean((2, 3)).tolist()} == {colour}


def test_two_levels_are_alphabets_of_characters(tmp_path):
    source = ImageFolder(str(omniglot_like(tmp_path, 5, 3, 4)), size=28, channels=1)
    tasks = ClassTasks(source, val=0.2, test=["Alphabet_3"])
    tasks.prepare()
    assert tasks.class_names("test") == [f"Alphabet_3/character0{number}" for number in (1, 2, 3)]
    assert len({name.split("/")[0] for name in tasks.class_names("val")}) == 1
    assert len(tasks.class_names("train")) == 9
    assert tasks.input_shape() == [1, 28, 28]


def test_hidden_files_and_those_of_other_kinds_are_passed_over(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path / name / "1.PNG")
        for other in ("Thumbs.db", ".DS_Store", "._1.png", "notes.txt"):
            (tmp_path / name / other).write_bytes(b"\0")
    saved(tmp_path / "__MACOSX" / "a" / "1.png")
    (tmp_path / ".git").mkdir()
    saved(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match="such as") as told_of:
        classes = ImageFolder(str(tmp_path), size=4).read_classes()
    assert (classes.names, classes.counts.tolist()) == (["a", "b"], [1, 1])
    lines = [str(warning.message).split(": ", 1)[1] for warning in told_of]
    assert lines == [
        "1 image(s) outside of its folders, such as 'loose.png', have no class",
        "4 file(s) that are no images, such as 'Thumbs.db', are passed over",
    ]


def test_links_are_followed_but_in_circles(tmp_path):
    saved(tmp_path / "kept" / "1.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").symlink_to(tmp_path / "kept")
    (tmp_path / "folder" / "all").symlink_to(tmp_path / "folder")
    source = ImageFolder(str(tmp_path / "folder"), size=4)
    assert source.read_classes().names == ["a"]
    # else its examples would be in two classes, and perhaps in two splits
    (tmp_path / "folder" / "b").symlink_to(tmp_path / "folder" / "a")
    with pytest.raises(InputError, match="the folders 'a' and 'b' are one, by a link; remove one of them"):
        source.read_classes()


def test_long_reading_gives_a_sign_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_folder, "_SILENCE", 0.0)
    ImageFolder(str(omniglot_like(tmp_path, 1, 2, 3, 9)), size=4, channels=1).read_classes()
    assert "metalit: 6 of 6 images are read" in capsys.readouterr().out


def test_folders_that_cannot_be_used_are_told(tmp_path):
    def read(folder):
        return ImageFolder(str(folder)).read_classes

    told(read("nowhere"), "data.tasks.source.folder='nowhere': there is no such folder")
    told(read(tmp_path), "is empty; make a subfolder for each class")
    saved(tmp_path / "1.png")
    told(read(tmp_path), "holds images, but no folder; make a subfolder for each class")
    (tmp_path / "b").mkdir()
    told(read(tmp_path), "the folder 'b' holds no image; add some or remove it")
    saved(tmp_path / "b" / "1.png")
    saved(tmp_path / "b" / "c" / "1.png")
    told(read(tmp_path), "the folder 'b' holds images and folders")


def test_a_broken_image_is_told_before_anything_is_trained(tmp_path):
    broken = omniglot_like(tmp_path, 3, 3, 3) / "Alphabet_1" / "character02" / "0102_02.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = TaskDataModule(ClassTasks(ImageFolder(str(tmp_path))), *[Episodes(2, 1, 2, 2)] * 3)
    told(lambda: data.setup("fit"), f"data.tasks.source.folder={str(broken)!r} is no image that can be read")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [({"size": 0}, "size=0"), ({"size": (28, -1)}, "size=(28, -1)"), ({"channels": 4}, "channels=4 must be 1 (grey)")],
)
def test_impossible_sizes_are_told(options, fragment):
    told(lambda: ImageFolder("any", **options), f"data.tasks.source.{fragment}")


def test_pixels_are_read_once(tmp_path, monkeypatch):
    tasks = ClassTasks(ImageFolder(str(omniglot_like(tmp_path, 3, 3, 3)), size=8, channels=1))
    tasks.prepare()
    monkeypatch.setattr(image_folder, "read_images", None)
    drawn = tasks.of_size("train", torch.arange(2), torch.arange(2), Episodes(ways=2, shots=1, queries=1))
    assert tasks.load(drawn, torch.device("cpu")).support.x.shape == (2, 2, 1, 8, 8)
