import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from danlu.data.pictures import decode, find_pictures, is_gray


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(colour, mode="RGB", size=(6, 6)):
    return encoded(Image.new(mode, size, colour))


def shard(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return str(path)


def test_a_table_names_files_beside_it_and_their_classes(tmp_path):
    (tmp_path / "a.png").write_bytes(plain("red"))
    table = tmp_path / "labels.csv"
    table.write_text("file,kind\na.png,cat\ngone.png,dog\n,cat\n")
    found = list(find_pictures([str(table)], image_field="file", label_field="kind"))
    assert [(p.data, p.label) for p in found] == [(tmp_path / "a.png", "cat"), (tmp_path / "gone.png", "dog")]
    assert found[0].read() == plain("red")
    with pytest.raises(ValueError, match="has the columns file, kind and not 'image'; set image_field"):
        list(find_pictures([str(table)]))


def test_a_shard_groups_members_by_their_key(tmp_path):
    red, blue = plain("red"), plain("blue")
    members = [
        ("x/0001.png", red),
        ("x/0001.cls", b"3\n"),
        ("x/0001.note.txt", b"a suffix of two parts is no class"),
        ("x/0002.json", json.dumps({"label": "dog"}).encode()),
        ("x/0002.png", blue),
        ("y/0002.txt", b"no image"),
        ("z.png", red),
    ]
    found = list(find_pictures([shard(tmp_path / "a.tar", members)]))
    assert [(p.name.split(": ")[1], p.data, p.label) for p in found] == [
        ("x/0001.png".removeprefix(""), red, "3"),
        ("x/0002.png", blue, "dog"),
        ("/z.png", red, None),
    ]
    with pytest.raises(ValueError, match="the key 'class'; set label_field"):
        list(find_pictures([str(tmp_path / "a.tar")], label_field="class"))
    (tmp_path / "b.tar").write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"b\.tar cannot be read as a tar file"):
        list(find_pictures([str(tmp_path / "b.tar")]))


def test_a_hugging_face_data_set_is_read_from_a_folder_and_from_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": plain(colour), "path": None} for colour in ("red", "blue", "red")]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [1, 0, 1]}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for path in ("saved", "rows.parquet"):
        found = list(find_pictures([str(tmp_path / path)]))
        assert [p.label for p in found] == ["dog", "cat", "dog"]
        assert found[1].read() == plain("blue")
    with pytest.raises(ValueError, match="has the columns image, label and not 'picture'"):
        list(find_pictures([str(tmp_path / "saved")], image_field="picture"))


def test_other_files_and_no_paths_are_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt is not a folder, an image"):
        list(find_pictures([str(tmp_path / "a.txt")]))
    with pytest.raises(ValueError, match="empty list"):
        list(find_pictures([]))
    with pytest.raises(TypeError, match="must be a sequence of paths"):
        list(find_pictures("folder"))
    with pytest.raises(FileNotFoundError, match="matches no file"):
        list(find_pictures([str(tmp_path / "*.webp")]))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_lossless_kinds_decode_to_their_pixels(kind):
    pixels = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3) * 3
    if kind == "GIF":  # a palette of at most 256 colours, more than there are here
        data = encoded(Image.fromarray(pixels).quantize(64, dither=0), kind)
        wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    else:
        data, wanted = encoded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {})), pixels
    assert np.array_equal(decode(data, size=5, channels=3, fit="crop"), wanted.transpose(2, 0, 1))


def test_an_oblong_image_is_cropped_padded_or_stretched():
    image = Image.new("L", (12, 6), 0)
    image.paste(200, (0, 0, 3, 6))  # the left quarter, which the crop loses
    crop, pad, stretch = (decode(encoded(image), size=6, channels=1, fit=f)[0] for f in ("crop", "pad", "stretch"))
    assert crop.max() == 0
    assert pad[0].tolist() == [255] * 6
    assert pad[3, 5] == 0
    assert stretch[:, 0].min() > 190
    assert stretch[:, 4].max() < 10


def test_transparency_turns_white_sixteen_bits_keep_their_range_and_cameras_turn():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encoded(clear), size=4, channels=3, fit="crop").min() == 255
    deep = Image.fromarray(np.full((4, 4), 2**15, dtype=np.uint16))
    assert decode(encoded(deep), size=4, channels=1, fit="crop").max() == 128
    turned = Image.new("L", (4, 4), 0)
    turned.paste(255, (0, 0, 4, 2))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    flipped = decode(encoded(turned, exif=exif.tobytes()), size=4, channels=1, fit="crop")[0]
    assert flipped[0].max() == 0
    assert flipped[3].min() == 255


def test_headers_tell_gray_from_colour_and_bytes_that_are_no_image_are_told():
    assert is_gray(plain(7, "L")) is True
    assert is_gray(plain("red")) is False
    assert is_gray(b"text") is None
    with pytest.raises(ValueError, match="not an image that Pillow can identify"):
        decode(b"text", size=4, channels=1, fit="crop")
    with pytest.raises(ValueError, match="mode F"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"), size=4, channels=1, fit="crop")
