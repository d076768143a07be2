"""How pictures are read: every mode looks as a viewer shows it, and what is no picture is one clear ModelError."""

import io
import json
import resource
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from multrace import ModelError
from multrace.data import DataError, PictureFacts, inspect_picture, megapixel_limit, read_pictures
from multrace.scripts.main import app
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

QUESTION = "Who founded the company in this photo?"
GREY = np.add.outer(np.arange(64), 3 * np.arange(64)).astype(np.uint8)  # 0 to 252


def shades(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


@pytest.fixture
def look(random_llava_llama) -> Callable[[object], np.ndarray]:
    """The pixels, 0 to 255, of a picture as a prompt holds it."""

    def pixels(image: object) -> np.ndarray:
        (read,) = random_llava_llama.prompt(image, QUESTION).images
        assert read.mode == "RGB"
        return np.asarray(read, dtype=int)

    return pixels


def sixteen(mode: str) -> Image.Image:
    return Image.frombytes(
        mode, GREY.shape, (GREY.astype(int) * 257).astype(">u2" if mode[-1] == "B" else "<u2").tobytes()
    )


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_look_like_eight(mode, look):
    assert np.array_equal(look(sixteen(mode)), shades(Image.fromarray(GREY)))
    assert np.abs(shades(sixteen(mode)) - shades(Image.fromarray(GREY))).max() > 200  # PIL alone clips them to white


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
def test_files_of_sixteen_bits(suffix, look, tmp_path):
    path = tmp_path / f"grey.{suffix}"
    sixteen("I;16").save(path)
    assert np.array_equal(look(path), shades(Image.fromarray(GREY)))
    with Image.open(path) as opened:
        assert np.array_equal(look(opened), shades(Image.fromarray(GREY)))


@pytest.mark.parametrize(("top", "error"), [(255, 0), (1023, 1), (65535, 0)])
def test_portable_grey_maps_of_any_depth(top, error, look, tmp_path):
    values = np.rint(GREY.astype(float) * top / 255).astype(">u2" if top > 255 else ">u1")
    (tmp_path / "grey.pgm").write_bytes(f"P5 64 64 {top}\n".encode() + values.tobytes())
    assert np.abs(look(tmp_path / "grey.pgm") - shades(Image.fromarray(GREY))).max() <= error


def test_numbers_without_a_range_are_refused(random_llava_llama, tmp_path):
    for array in (GREY.astype(np.int32), GREY.astype(np.float32) / 255):
        image = Image.fromarray(array)
        image.save(tmp_path / "numbers.tif")
        for given in (image, tmp_path / "numbers.tif"):
            with pytest.raises(ModelError, match="without a fixed range; scale them to 0 for black and 255 for white"):
                random_llava_llama.prompt(given, QUESTION)


def test_a_tiff_whose_white_is_zero_is_refused_in_sixteen_bits(random_llava_llama, tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    sixteen("I;16").save(tmp_path / "negative.tif", tiffinfo=tags)
    with Image.open(tmp_path / "negative.tif") as opened:
        assert (opened.mode, opened.tag_v2[262]) == ("I;16", 0)
    with pytest.raises(ModelError, match="must have 8 or 16 bits and store black as 0; save it as PNG"):
        random_llava_llama.prompt(tmp_path / "negative.tif", QUESTION)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "La", "RGBA", "RGBa", "RGBX", "CMYK"])
def test_opaque_pictures_of_every_mode_keep_their_colours(mode, look, photo):
    base = photo.convert({"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(mode, "RGB"))
    image = base.convert(mode)
    assert np.array_equal(look(image), shades(image.convert("LA") if mode == "La" else image))


def clear_palette() -> Image.Image:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 200, 30, 60])
    image.info["transparency"] = 1
    return image


CLEAR = {
    "RGBA": Image.new("RGBA", (6, 4), (200, 30, 60, 0)),
    "RGBa": Image.new("RGBA", (6, 4), (200, 30, 60, 0)).convert("RGBa"),
    "LA": Image.new("LA", (6, 4), (80, 0)),
    "La": Image.new("LA", (6, 4), (80, 0)).convert("La"),
    "PA": Image.new("RGBA", (6, 4), (200, 30, 60, 0)).convert("PA"),
    "a colour of a palette": clear_palette(),
}
KEYS = {"RGB": (9, 8, 7), "L": 9, "I;16": 900, "1": 1}


@pytest.mark.parametrize("case", CLEAR)
def test_transparent_pixels_show_white(case, look):
    assert (look(CLEAR[case]) == 255).all()


@pytest.mark.parametrize("mode", KEYS)
def test_one_transparent_colour_shows_white(mode, look, tmp_path):
    Image.new(mode, (6, 4), KEYS[mode]).save(tmp_path / "key.png", transparency=KEYS[mode])
    assert (look(tmp_path / "key.png") == 255).all()
    Image.new(mode, (6, 4), 0).save(tmp_path / "other.png", transparency=KEYS[mode])
    assert (look(tmp_path / "other.png") == 0).all()


def test_half_transparent_black_is_grey(look):
    assert (look(Image.new("RGBA", (6, 4), (0, 0, 0, 128))) == 127).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_a_file_and_the_present_one_of_an_open_picture(suffix, look, tmp_path):
    red, blue = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    red.save(
        tmp_path / f"frames.{suffix}",
        save_all=True,
        append_images=[blue],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    assert np.array_equal(look(tmp_path / f"frames.{suffix}"), shades(red))
    with Image.open(tmp_path / f"frames.{suffix}") as opened:
        opened.seek(1)
        assert np.array_equal(look(opened), shades(blue))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, look, photo, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = orientation
    photo.crop((0, 0, 40, 24)).save(tmp_path / "turned.png", exif=tags)
    with Image.open(tmp_path / "turned.png") as opened:
        assert np.array_equal(look(opened), shades(ImageOps.exif_transpose(opened)))
    assert look(tmp_path / "turned.png").shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_picture_that_was_read_is_read_again_as_it_is(mode, orientation, suffix, look, photo, tmp_path):
    tags, path = Image.Exif(), tmp_path / f"turned.{suffix}"
    tags[0x0112] = orientation
    kept = mode if suffix in ("png", "tif") else "RGB"
    photo.crop((0, 0, 40, 24)).convert(kept).save(path, exif=tags)
    (once,) = read_pictures(path)
    (twice,) = read_pictures(once)
    assert np.array_equal(shades(once), shades(twice)) and np.array_equal(shades(once), look(path))
    with Image.open(path) as opened:
        assert np.array_equal(shades(*read_pictures(opened)), shades(once))
        assert np.array_equal(shades(*read_pictures(opened)), shades(once))  # the picture itself is left alone


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_exif_data_turn_nothing(suffix, look, photo, tmp_path):
    path = tmp_path / f"exif.{suffix}"
    photo.save(path, exif=b"Exif\0\0no such header")
    with Image.open(path) as opened:
        assert np.array_equal(look(path), shades(opened))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 50), (50, 3)])
def test_pictures_of_few_pixels(size, look):
    assert look(Image.new("RGB", size, "red")).shape == (size[1], size[0], 3)


NO_PATHS = {
    "a data URI": ("data:image/png;base64," + "A" * 5000, "a text of 5022 characters; decode base64 text and pass"),
    "a short data URI": ("data:image/png;base64,AAAA", "decode base64 text"),
    "base64 text": ("iVBORw0KGgo" * 1000, "decode base64 text"),
    "a URL": ("https://example.org/photo.jpg", "fetch it and pass the path of the file"),
    "a file's URL": ("file:///photo.jpg", "fetch it and pass the path"),
    "nothing": ("", "no picture at '' (No such file"),
    "a null character": ("photo\0.png", "no picture at 'photo\\x00.png' (embedded null byte)"),
    "a name of bytes that are no text": ("\udcff.png", "no picture at '\\udcff.png'"),
    "a folder": (".", "no picture at '.': it is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_PATHS)
def test_texts_that_are_no_path_of_a_picture(case, random_llava_llama):
    text, found = NO_PATHS[case]
    with pytest.raises(ModelError) as caught:
        random_llava_llama.prompt(text, QUESTION)
    assert found in str(caught.value)
    assert len(str(caught.value).encode()) < 300


class Odd:
    """A path whose text is what it was made with."""

    def __init__(self, text: object) -> None:
        self.text = text

    def __fspath__(self) -> object:
        return self.text


def test_paths_of_bytes(look, photo, photo_path):
    assert np.array_equal(look(Odd(bytes(photo_path))), shades(photo))


NO_PICTURES = {
    "BytesIO": io.BytesIO(b"photo"),
    "memoryview": memoryview(b"photo"),
    "set": {"photo.png"},
    "generator": (path for path in ["photo.png"]),
    "Odd": Odd(3),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_pictures_of_a_wrong_type(kind, random_llava_llama):
    with pytest.raises(ModelError, match=f"a picture cannot be of type {kind}; pass a path, a PIL image"):
        random_llava_llama.prompt(NO_PICTURES[kind], QUESTION)


DAMAGED = {
    "words.png": b"no picture",
    "empty.png": b"",
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "letters.ppm": b"P6 a b 255\n",
    "digits.ppm": b"P6 99999999999999999999 4 255\n",
    "short.ppm": b"P6 4 4 255\nabc",
    "colours.ppm": b"P6 4 4 0\n" + bytes(48),
    "header.bmp": b"BM" + b"\xff" * 60,
    "header.gif": b"GIF89a" + b"\xff" * 20,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_hold_no_whole_picture(name, random_llava_llama, tmp_path):
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(ModelError, match=f"cannot read picture '.*{name}': .*; is it a whole image file?"):
        random_llava_llama.prompt(tmp_path / name, QUESTION)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif", "ppm"])
def test_half_a_file_is_refused(suffix, random_llava_llama, make_photo, tmp_path):
    whole = tmp_path / f"whole.{suffix}"
    make_photo(1, size=200).save(whole)
    random_llava_llama.prompt(whole, QUESTION)
    half = tmp_path / f"half.{suffix}"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ModelError, match=f"cannot read picture '.*half.{suffix}'"):
        random_llava_llama.prompt(half, QUESTION)


def test_pictures_closed_before_they_were_read(random_llava_llama, look, photo, photo_path):
    with Image.open(photo_path) as of_a_path:
        pass
    with photo_path.open("rb") as file:
        of_a_file = Image.open(file)
    emptied = photo.copy()
    emptied.close()
    for closed in (of_a_path, of_a_file, emptied):
        with pytest.raises(ModelError, match="cannot read picture .*; was its file closed before it was read?"):
            random_llava_llama.prompt(closed, QUESTION)
    with Image.open(photo_path) as read_in_time:
        read_in_time.load()
    assert np.array_equal(look(read_in_time), shades(photo))


@pytest.fixture
def huge_path(tmp_path: Path) -> Path:
    """A file of 30 kB that holds 225 megapixels."""
    Image.new("1", (15000, 15000)).save(tmp_path / "huge.png")
    return tmp_path / "huge.png"


def header_of_a_bmp(width: int, height: int) -> bytes:
    head = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def test_more_pixels_than_the_limit(huge_path, random_llava_llama, look, monkeypatch):
    with pytest.raises(ModelError, match=r"huge.png': it has 225.0 megapixels, more than the limit of 89.5 megapixels"):
        random_llava_llama.prompt(huge_path, QUESTION)
    Image.new("1", (40, 40)).save(huge_path)
    assert look(huge_path).shape == (40, 40, 3)
    for limit in (500, 1000):  # PIL raises an error itself for more than twice its limit, and warns below
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for picture in (huge_path, Image.new("1", (40, 40))):
            with pytest.raises(
                ModelError, match="raise the limit .--megapixels, or multrace.data.megapixel_limit. if you trust it"
            ):
                random_llava_llama.prompt(picture, QUESTION)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert look(huge_path).shape == (40, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert look(huge_path).shape == (40, 40, 3)


def test_a_limit_of_megapixels_holds_inside_its_block(huge_path):
    before = Image.MAX_IMAGE_PIXELS
    Image.new("1", (1500, 1000)).save(huge_path)
    with megapixel_limit(1.4):
        with pytest.raises(
            DataError, match="1.5 megapixels, more than the limit of 1.4 megapixels; make it smaller, or"
        ):
            read_pictures(huge_path)
        with megapixel_limit(1.5):
            assert read_pictures(huge_path)[0].size == (1500, 1000)
        with megapixel_limit(None):
            assert inspect_picture(huge_path).problem is None
        assert Image.MAX_IMAGE_PIXELS == 1_400_000
    assert Image.MAX_IMAGE_PIXELS == before
    for limit in (0, -1, float("nan"), float("inf"), True, "200"):
        with pytest.raises(DataError, match="pass a number above 0, or None for no limit"), megapixel_limit(limit):
            pass


@pytest.mark.parametrize("compression", ["tiff_lzw", "group4"])
def test_a_damaged_tiff_is_one_error_and_writes_nothing_of_its_own(compression, tmp_path, capfd):
    """libtiff writes about damage to the standard error stream of the process, and goes on after some of it."""
    photo = Image.effect_noise((160, 120), 60).convert("1" if compression == "group4" else "RGB")
    photo.save(tmp_path / "whole.tif", compression=compression)
    assert read_pictures(tmp_path / "whole.tif")[0].size == (160, 120)
    raw = (tmp_path / "whole.tif").read_bytes()
    for start in range(600, 1500, 300):
        (tmp_path / "damaged.tif").write_bytes(raw[:start] + b"\xff" * 60 + raw[start + 60 :])
        with pytest.raises(DataError, match=r"cannot read picture '.*damaged.tif': .*; is it a whole image file"):
            read_pictures(tmp_path / "damaged.tif")
    assert capfd.readouterr() == ("", "")


def test_messages_of_libtiff_go_their_old_way_outside(tmp_path, capfd):
    photo = Image.effect_noise((160, 120), 60).convert("1")
    photo.save(tmp_path / "whole.tif", compression="group4")
    raw = (tmp_path / "whole.tif").read_bytes()
    (tmp_path / "damaged.tif").write_bytes(raw[:200] + b"\xff" * 40 + raw[240:])
    with pytest.raises(DataError, match="damaged.tif': libtiff finds it damaged .Fax4Decode.; is it a whole image"):
        read_pictures(tmp_path / "damaged.tif")
    assert capfd.readouterr().err == ""
    Image.open(tmp_path / "damaged.tif").load()
    assert "Fax4Decode" in capfd.readouterr().err


@pytest.mark.parametrize("size", [(13000, 13000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_claims_many_pixels_takes_no_memory(size, random_llava_llama, tmp_path, recwarn):
    (tmp_path / "claim.bmp").write_bytes(header_of_a_bmp(*size))
    random_llava_llama.prompt(Image.new("RGB", (8, 8)), QUESTION)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="megapixels, more than the limit"):
        random_llava_llama.prompt(tmp_path / "claim.bmp", QUESTION)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB; the pixels are 500 MiB
    assert not recwarn.list  # PIL's own warning is this error


def test_threads_that_read_pictures_leave_the_filters_of_warnings(tmp_path):
    (tmp_path / "claim.bmp").write_bytes(header_of_a_bmp(13000, 13000))
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        facts = list(pool.map(inspect_picture, [tmp_path / "claim.bmp", tmp_path / "small.png"] * 200))
    assert [each.problem is None for each in facts] == [False, True] * 200
    assert list(warnings.filters) == before


def test_a_picture_below_the_limit_is_not_reduced(look, make_photo, tmp_path):
    # PIL can decode a JPEG at half its size, which is cheaper, but gives the model other pixels.
    photo = make_photo(3, size=640)
    photo.save(tmp_path / "photo.jpg", quality=90)
    with Image.open(tmp_path / "photo.jpg") as opened:
        assert np.array_equal(look(tmp_path / "photo.jpg"), shades(opened))
    with Image.open(tmp_path / "photo.jpg") as opened:
        opened.draft("RGB", (64, 64))
        assert opened.size != (640, 640)


def test_a_huge_picture_costs_a_run_only_its_own_record(huge_path, photo_path, llava_llama_path, tmp_path, capsys):
    lines = [
        {"id": name, "image": str(path), "question": QUESTION, "constraint": words}
        for name, path, words in (
            ("one", photo_path, "the company"),
            ("two", huge_path, "the company"),
            ("three", photo_path, "this photo"),
        )
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--corrupt", "blank", "--sites", "hidden", "--positions", "last", "--even-if-weak"]
    records = ["--model", str(llava_llama_path), "--data", str(tmp_path / "records.jsonl")]
    assert app(["trace", *records, *options, "--out", str(tmp_path / "out")]) == 1
    printed = "".join(capsys.readouterr())
    assert "2 records done, 1 failed" in printed
    assert "two: cannot read picture" in printed and "it has 225.0 megapixels" in printed


def test_an_option_of_commands_raises_and_lowers_the_limit(huge_path, photo_path, llava_llama_path, tmp_path, capsys):
    before = Image.MAX_IMAGE_PIXELS
    (tmp_path / "one.jsonl").write_text(json.dumps({"image": str(huge_path), "question": QUESTION}))
    check = ["data", "check", str(tmp_path / "one.jsonl")]
    assert app(check) == 1
    assert "225.0 megapixels" in capsys.readouterr().out
    assert app([*check, "--megapixels", "226"]) == 0
    assert "megapixels" not in capsys.readouterr().out
    with Image.open(photo_path) as opened:
        size = opened.width * opened.height / 1e6
    ask = ["answer", "--model", str(llava_llama_path), "--image", str(photo_path), "--question", QUESTION]
    assert app([*ask, "--megapixels", str(0.9 * size)]) == 2
    assert "--megapixels" in capsys.readouterr().err
    assert app([*ask, "--megapixels", "89"]) == 0
    assert app([*ask, "--megapixels", "0"]) == 2
    assert "pass a number above 0" in capsys.readouterr().err
    assert before == Image.MAX_IMAGE_PIXELS


# ---- inspection without decoding ----


def test_inspection_agrees_with_reading(look, photo, tmp_path):
    wide = photo.crop((0, 0, 40, 24))
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = orientation
        for suffix in ("jpg", "png", "tif", "webp"):
            path = tmp_path / f"turned{orientation}.{suffix}"
            wide.save(path, exif=tags)
            facts, read = inspect_picture(path), look(path)
            assert (facts.size, facts.turned) == ((read.shape[1], read.shape[0]), orientation != 1)
            assert (facts.transparent, facts.sixteen_bit, facts.problem) == (False, False, None)
            assert facts.mode == "RGB" and facts.megapixels == 40 * 24 / 1e6


def test_what_inspection_says_of_modes(tmp_path):
    facts = {}
    for mode in ("1", "L", "P", "LA", "RGBA", "I;16", "RGB"):
        Image.new(mode, (6, 4)).save(tmp_path / "a.png")
        facts[mode] = inspect_picture(tmp_path / "a.png")
    clear_palette().save(tmp_path / "a.png")
    facts["clear"] = inspect_picture(tmp_path / "a.png")
    assert {mode for mode in facts if facts[mode].transparent} == {"LA", "RGBA", "clear"}
    assert {mode for mode in facts if facts[mode].sixteen_bit} == {"I;16"}
    assert all(each.format == "PNG" and each.size == (6, 4) and each.problem is None for each in facts.values())


def test_inspection_and_reading_refuse_with_the_same_words(huge_path, random_llava_llama, tmp_path):
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "numbers.tif")
    (tmp_path / "words.png").write_bytes(b"no picture")
    (tmp_path / "letters.ppm").write_bytes(b"P6 a b 255\n")
    (tmp_path / "claim.bmp").write_bytes(header_of_a_bmp(13000, 13000))
    names = ["numbers.tif", "words.png", "letters.ppm", "claim.bmp", "huge.png", "missing.png", "."]
    for path in (tmp_path / name for name in names):
        with pytest.raises(ModelError) as caught:
            random_llava_llama.prompt(path, QUESTION)
        assert inspect_picture(path).problem == str(caught.value)
    assert [inspect_picture(tmp_path / name).megapixels for name in names] == [
        0.004096,
        None,
        None,
        169,
        225,
        None,
        None,
    ]
    assert inspect_picture("missing.png") == PictureFacts(
        path=Path("missing.png"),
        problem="no picture at 'missing.png' (No such file or directory); pass the path of an image file",
    )


def test_inspection_decodes_nothing(photo, tmp_path, monkeypatch):
    paths = []
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm"):
        photo.save(tmp_path / f"photo.{suffix}")
        paths.append(tmp_path / f"photo.{suffix}")
    expected = [inspect_picture(path) for path in paths]

    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    for kind in (ImageFile.ImageFile, *ImageFile.ImageFile.__subclasses__()):
        monkeypatch.setattr(kind, "load", load)
    assert [inspect_picture(path) for path in paths] == expected
    assert all(each.problem is None for each in expected)


def test_pictures_of_unequal_sizes_where_the_processor_takes_equal_ones_only(random_llava_llama, monkeypatch):
    """An image processor that neither resizes nor crops cannot stack what it makes of unequal pictures."""
    for setting in ("do_resize", "do_center_crop"):
        monkeypatch.setattr(random_llava_llama.processor.image_processor, setting, False)
    wide, square = Image.new("RGB", (48, 32)), Image.new("RGB", (32, 32))
    reason = r"takes no pictures of unequal sizes \(48 x 32, 32 x 32 pixels\) in one prompt; pass pictures of one size"
    with pytest.raises(ModelError, match=reason) as caught:
        random_llava_llama.prompt([wide, square], QUESTION)
    assert "\n" not in str(caught.value)
    assert random_llava_llama.prompt([square, square], QUESTION).images
