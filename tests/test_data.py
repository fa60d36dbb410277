"""Tier 3: data sets, good and bad. Every mistake is one sentence that names file, line and remedy."""

import base64
import functools
import gzip
import http.server
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pyarrow.parquet
import pytest
from PIL import ExifTags, Image

import data as data_flow
import pictures
import utils
from conftest import png, ROOT
from data import IMAGE_MARK, INSTRUCTION, load_samples, make_sample, write_rows
from pictures import open_image, size_or_problem
from policy import bound_pixels, collate, load_model, load_processor
from runs import fork

GOOD = {"question": "<image>How many?", "answer": "3", "id": "a", "image": "images/a.png"}


TEXT = {"question": "1 + 1 = ?", "answer": "2"}
TWO = {"question": "same?", "answer": "0", "images": ["images/a.png", "images/line.png"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (84, 84), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "text.png").write_text("not an image")
    whole = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (500, 2), "red").save(tmp_path / "images" / "line.png")
    (tmp_path / "images" / "bare").write_bytes(whole)
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    return load_processor("toy_model")


def load(folder, lines, processor, longest=512, *reading):
    path = folder / "data.jsonl"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return load_samples(path, processor, longest, *reading)


MISTAKES = [  # (rows, what the sentence must hold)
    ([GOOD, "{broken\n"], "data.jsonl, line 2: not valid JSON"),
    ([GOOD, "[1, 2]\n"], "data.jsonl, line 2: not a JSON object"),
    ([{"answer": "3"}], 'line 1: field "question" is missing, empty or no text'),
    ([{"question": "How many?"}], 'line 1: field "answer" is missing, empty or no text'),
    ([{"question": "How many?", "answer": " "}], 'field "answer" is missing, empty or no text'),
    ([GOOD | {"image": "images/b.png"}], "line 1: image images/b.png does not exist"),
    ([GOOD | {"image": "../a.png"}], "line 1: image ../a.png lies outside"),
    ([GOOD | {"image": "/etc/hostname"}], "line 1: image /etc/hostname lies outside"),
    ([GOOD | {"image": "images"}], "line 1: image images does not exist"),
    ([GOOD | {"image": "images/text.png"}], "images/text.png cannot be read"),
    ([GOOD | {"image": "images/cut.png"}], "images/cut.png cannot be read"),
    ([GOOD | {"image": 3}], "line 1: an image is given as 3; give its path"),
    ([GOOD | {"image": "a\0b"}], "line 1: an image is given as 'a\\x00b'"),
    ([GOOD | {"images": "images/a.png"}], "line 1: images must be a list of paths"),
    ([GOOD | {"answer": False}], 'field "answer" is missing, empty or no text'),
    ([GOOD | {"answer": float("nan")}], 'field "answer" is missing, empty or no text'),
    ([GOOD | {"image": "images/line.png"}], "line 1: the processor refuses the row"),
    ([GOOD | {"question": "<image><|im_start|>?"}], "holds the model's mark <|im_start|>"),
    ([{"question": "<image>?", "answer": "1"}], "line 1: 1 <image> marks in the question for 0 images"),
    ([GOOD | {"question": "<image><image>?"}], "line 1: 2 <image> marks in the question for 1 images"),
    ([TWO | {"question": "<image>?"}], "line 1: 1 <image> marks in the question for 2 images"),
    ([GOOD | {"question": "<image>a<|im_end|>"}], "holds the model's mark <|im_end|>"),
    ([GOOD, {"question": "?", "answer": "1"}, GOOD], "data.jsonl, line 3: two rows have the same id a;"),
    ([GOOD | {"id": 0}, GOOD | {"id": "0"}], "two rows have the same id 0; make every id unique"),
    ([GOOD | {"id": [1]}], 'line 1: field "id" is missing, empty or no text'),
    ([GOOD | {"solution": ["a"]}], 'line 1: field "solution" is missing, empty or no text'),
    (['{"question": "?", "answer": "1", "image": "images/a.png", "image": "b.png"}\n'], "two fields have one name"),
    (['{"question": "?", "answer": 1' + "0" * 5000 + "}\n"], "line 1: not valid JSON (Exceeds the limit"),
    # half of a pair of UTF-16, which JSON can write and nothing can encode
    ([GOOD | {"question": "<image>\ud800"}], 'line 1: field "question" holds half a character'),
    ([GOOD | {"answer": "\udfff"}], 'line 1: field "answer" holds half a character'),
    ([GOOD | {"solution": "a\ud800"}], 'line 1: field "solution" holds half a character'),
    ([GOOD | {"id": "\ud800"}], 'line 1: field "id" holds half a character'),
    ([GOOD | {"image": "\ud800.png"}], "line 1: an image is given as '\\ud800.png'"),
    ([GOOD | {"image": "a" * 5000}], "a does not exist in"),
    ([GOOD | {"image": {"bytes": None, "path": "images/b.png"}}], "line 1: image images/b.png does not exist"),
    ([GOOD | {"image": {"url": "a"}}], "line 1: an image is given as {'url': 'a'}; give its path"),
    ([GOOD | {"image": "https://x.org/a.png"}], "line 1: image https://x.org/a.png is an address; download it"),
    ([GOOD | {"image": "data:image/png;base64,iVBO!"}], "line 1: an image in base 64 cannot be read"),
    ([GOOD | {"image": "data:image/png;base64,iVBO"}], "image bytes cannot be read"),
    ([TWO | {"images": ["images/a.png", None]}], "line 1: an image is given as None"),
    # pictures that nobody would look at
    ([TEXT | {"picture": "images/a.png"}], 'line 1: the field "picture" holds a picture'),
    ([TEXT | {"img": "not/there.JPG"}], 'line 1: the field "img" holds a picture'),
    ([TEXT | {"Image": {"bytes": None, "path": "images/a.png"}}], 'the field "Image" holds a picture'),
    ([TEXT | {"x": "data:image/png;base64,iVBO"}], 'the field "x" holds a picture'),
    ([TEXT | {"x": [{"y": ["iVBORw0KGgoAAAANSUhEUg"]}]}], 'the field "x" holds a picture'),
    ([TEXT | {"file_name": "not/there.png"}], 'the field "file_name" holds a picture'),
    ([TEXT | {"source": "images/bare"}], 'the field "source" holds a picture'),
    ([GOOD | {"x": "data:image/png;base64,iVBO"}], 'the field "x" holds a picture'),
    ([GOOD | {"second": "images/line.png"}], 'the field "second" holds a picture'),
    ([GOOD | {"image2": "not/there.png"}], 'the field "image2" holds a picture'),
    ([GOOD | {"images": ["images/line.png"]}], "line 1: images and image hold different images; keep one"),
    ([TEXT | {"question": "<image 1>?"}], "line 1: the question holds <image 1>; images alone are read"),
    ([GOOD | {"question": "<image>and<image_2>?"}], "line 1: the question holds <image_2>; images alone"),
    ([GOOD, "\n"] + ["\n"] * 2 + [TEXT | {"videos": [3]}], 'line 5: the field "videos" holds a video or sound'),
    ([GOOD | {"second": "a.png"}, GOOD | {"more": "line.png"}], None),  # of the same names, and not there
    ([TEXT | {"question": "Look: ![](img/1.png) What?"}], "line 1: the question holds ![](; images alone are read"),
    ([TEXT | {"question": '<img src="images/a.png"> What?'}], "line 1: the question holds <img src"),
    ([TEXT | {"question": "\\includegraphics{a.png} What?"}], "line 1: the question holds \\includegraphics"),
    ([TEXT | {"question": "![a](data:image/png;base64,iVBO)"}], "line 1: the question holds ![a]("),
    *[([GOOD | {"question": f"<image>and {mark}?"}], f"line 1: the question holds {mark}; images alone") for mark in (
        "<ImageHere>", "<img>", "<|image_1|>", "<image_placeholder>", "< image >", "<|image_pad|>"[:7] + ">", "<Image>",
        "<video>", "<image_token>", "<|img|>", "<IMG_01>") if mark != "<image>"],
    ([GOOD | {"image": "a\nb.png"}], "line 1: an image is given as 'a\\nb.png'"),
    (["\n"], "holds no rows"),
]
LOST = [  # beside a question and an answer: a picture that nobody would see
    {"image_path": '["img/1.png"]'}, {"image_paths": "['img/1.png', 'img/2.png']"}, {"picture": "img/1.png "},
    {"picture": "img/1.png;"}, {"figures": {"img/1.png": "left"}}, {"captions": {"img/1.png": "left"}},
    {"image_url": "https://picsum.photos/200"},
    {"img": "s3://b/1234"}, {"img": "COCO_val_000001"}, {"image_id": 262148}, {"x": "<svg viewBox='0 0 1 1'>"},
    {"x": "data:application/octet-stream;base64,iVBOR"}, {"x": " iVBORw0KGgoAAAANSUhEUg"}, {"img": [137, 80, 78, 71]},
    {"figure": {"pixels": [[0, 1], [1, 0]]}}, {"id": "images/a.png"}, {"answer": "images/a.png"},
    {"solution": "images/a.png"}, {"Photo_2": "b"}, {"x": {"y": [{"z": "q/1.webp?size=3"}]}}]


@pytest.mark.parametrize("more", LOST, ids=str)
def test_a_picture_in_another_form_is_refused_by_name(folder, processor, more):
    (name,) = more
    with pytest.raises(utils.UserError, match=f'line 1: the field "{name}" holds a picture .* that would be lost'):
        load(folder, [TEXT | more], processor)


@pytest.mark.parametrize("kind", ["bmp", "tiff", "ppm", "webp", "gif"])
def test_a_picture_of_any_kind_in_base_64_is_found(folder, processor, kind):
    file = io.BytesIO()
    Image.effect_noise((60, 60), 9).save(file, kind)
    with pytest.raises(utils.UserError, match='the field "x" holds a picture'):
        load(folder, [TEXT | {"x": as_text(file.getvalue())}], processor)
    assert load(folder, [TEXT | {"x": as_text(b"no picture " * 40)}], processor)


def test_another_picture_of_the_same_name_is_another_picture(folder, processor):
    """What the row's picture is called elsewhere is metadata; a file that is there is not."""
    (folder / "a.png").write_bytes(png("blue"))
    with pytest.raises(utils.UserError, match='the field "second" holds a picture .* --columns images=image.second'):
        load(folder, [GOOD | {"second": "a.png"}], processor)


def test_the_remedy_can_be_followed(folder, processor):
    """Two fields become the row's pictures, in the order given; one that is nested, or read as text, can only go."""
    row = TEXT | {"question": "Left <image> or right <image>?", "left": "images/a.png", "right": "images/bare"}
    with pytest.raises(utils.UserError, match="name it by --columns images=left.right, or remove it"):
        load(folder, [row], processor)
    for columns in ("images=left+right", "images=right+left"):
        (sample,) = load(folder, [row], processor, 512, columns)
        asked = columns.partition("=")[2].split("+")
        assert sample.images == [str(folder / row[name]) for name in asked]
    one = {"question": "?", "answer": "1", "left": ["images/a.png"], "right": None}
    (sample,) = load(folder, [one], processor, 512, "images=left+right")
    assert sample.images == [str(folder / "images" / "a.png")]
    for more in ({"meta": {"pic": "images/a.png"}}, {"id": "images/a.png"}):
        with pytest.raises(utils.UserError, match="that would be lost; remove it"):
            load(folder, [TEXT | more], processor)
    for columns in ("images=left+left", "question=right,answer=right", "images=left+"):
        with pytest.raises(utils.UserError, match="each once, or images=THEIRS"):
            load(folder, [row], processor, 512, columns)


@hypothesis.settings(max_examples=100, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_a_picture_is_used_or_refused_wherever_it_stands(folder, processor, data):
    """A real one, by its path, as bytes, in base 64; in a list, a list as text, a map; in a field of any name."""
    content = png("red")
    form = data.draw(st.sampled_from(["images/a.png", "images/bare", content, as_text(content),
                                      "data:image/png;base64," + as_text(content), {"bytes": content, "path": None},
                                      {"bytes": None, "path": "images/a.png"}]))
    wrap = data.draw(st.sampled_from([lambda x: x, lambda x: [x], lambda x: {"x": x}, lambda x: [{"y": [x]}],
                                      lambda x: (["images/a.png"] if isinstance(x, str) else x) and [None, x]]))
    name = data.draw(st.sampled_from(["image", "images", "decoded_image", "image_1", "pic", "a", "options", "id",
                                      "solution", "meta", "Image", "file_name", "url"]))
    row = {"question": "What?", "answer": "3", name: wrap(form)}
    try:
        sample = make_sample(row, folder, "x.jsonl, line 7", processor)
    except utils.UserError as error:
        assert str(error).startswith("x.jsonl, line 7: ")
    else:
        assert len(sample.images) == 1, row


def test_many_pictures_in_one_file_are_refused(folder, processor):
    frames = [Image.new("RGB", (84, 84), colour) for colour in ("red", "blue", "green")]
    for kind in ("gif", "webp", "tiff", "png"):
        frames[0].save(folder / f"a.{kind}", save_all=True, append_images=frames[1:])
        with pytest.raises(utils.UserError, match=rf"line 1: image .*a.{kind} holds 3 pictures, one after the other"):
            load(folder, [GOOD | {"image": f"a.{kind}"}], processor)
    frames[0].save(folder / "a.mpo", save_all=True, append_images=frames[1:])  # a camera's, with previews
    assert load(folder, [GOOD | {"image": "a.mpo"}], processor)


def test_rows_of_numbers_are_no_files(folder, processor, monkeypatch):
    """Embeddings beside a row: no file is looked for where there is no text."""
    looked = []
    honest = os.path.isfile
    monkeypatch.setattr(pictures.os.path, "isfile", lambda path: looked.append(path) or honest(path))
    load(folder, [TEXT | {"embedding": [0.5] * 4096, "tokens": [7] * 99}], processor)
    assert len(looked) < 20


@pytest.mark.parametrize("lines, sentence", MISTAKES)
def test_mistakes_in_the_data(folder, processor, lines, sentence):
    if sentence is None:
        lines = [line | {"id": i} for i, line in enumerate(lines)]
        (folder / "images" / "line.png").unlink()
        assert [len(s.images) for s in load(folder, lines, processor)] == [1, 1]
        return
    with pytest.raises(utils.UserError) as error:
        load(folder, lines, processor)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(folder, processor):
    with pytest.raises(utils.UserError, match="none.jsonl: no such file or folder; give the path"):
        load_samples(folder / "none.jsonl", processor, 512)


def test_inside_is_what_is_written_so(folder, processor, tmp_path):
    """The hub's cache has nothing but links, whose files lie elsewhere; absolute paths and those that begin
    from another folder need its name, and still do not leave it."""
    snapshot, blobs = tmp_path / "snapshots" / "1a2b", tmp_path / "blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    (folder / "images" / "a.png").rename(blobs / "3c4d")
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/3c4d")
    assert load(snapshot, [GOOD], processor)[0].images == [str(snapshot / "images" / "a.png")]
    other = tmp_path / "other"
    other.mkdir()
    for image, root in ((str(snapshot / "images" / "a.png"), snapshot), ("1a2b/images/a.png", tmp_path / "snapshots"),
                        ("images/../images/./a.png", str(snapshot)), (str(blobs / "3c4d"), "/")):
        rows = [GOOD | {"image": image}]
        assert load(other, rows, processor, 512, "", INSTRUCTION, root)[0].prompt_ids == load(
            snapshot, [GOOD], processor)[0].prompt_ids
        with pytest.raises(utils.UserError, match="(lies outside|does not exist in) .* as --image_root"):
            load(other, rows, processor)
    for image in (str(blobs / "3c4d"), "../../blobs/3c4d", "images/../../../blobs/3c4d"):
        with pytest.raises(utils.UserError, match="lies outside"):
            load(snapshot, [GOOD | {"image": image}], processor)


def test_long_prompts_are_dropped_and_said(folder, processor, capsys):
    long = GOOD | {"id": "long", "question": "<image>" + "How many? " * 50}
    kept = load(folder, [GOOD, long], processor, longest=60)
    assert [s.id for s in kept] == ["a"]
    assert "left out 1 of 2 prompts that are longer than 60 tokens: long" in capsys.readouterr().err
    with pytest.raises(utils.UserError, match="every prompt is longer than --max_prompt_tokens 5, "):
        load(folder, [GOOD], processor, longest=5)


def test_rows_of_every_kind_become_samples(folder, processor):
    """One image, several with text between, none; ids and numbers as text; blank lines skipped."""
    two = {"question": "<image>and<image>: same?", "answer": 0, "images": ["images/a.png"] * 2}
    text = {"question": "1 + 1 = ?", "answer": "2", "id": 7, "solution": "\\boxed{2}"}
    one, pair, plain = load(folder, [GOOD, "\n", two, text], processor)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    assert one.prompt_text.startswith(f"<|im_start|>user\n{mark}How many?\n{INSTRUCTION}")
    assert one.prompt_text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert pair.prompt_text.count(mark) == 2 and f"{mark}and{mark}" in pair.prompt_text
    assert (pair.answer, pair.id, pair.place) == ("0", "data.jsonl, line 3", f"{folder / 'data.jsonl'}, line 3")
    assert (plain.images, plain.id, plain.solution) == ([], "7", "\\boxed{2}")
    pads = [s.prompt_ids.count(processor.image_token_id) for s in (one, pair, plain)]
    assert pads == [9, 18, 0]  # 84 x 84 pixels: 3 x 3 merged patches


def test_where_no_mark_stands_the_images_stand_first(folder, processor):
    one, two = load(folder, [GOOD | {"question": "How many?"}, TWO | {"images": ["images/a.png"] * 2}], processor)
    assert one.prompt_ids == load(folder, [GOOD], processor)[0].prompt_ids
    assert two.question == "<image><image>same?" and two.prompt_ids.count(processor.image_token_id) == 18


def test_metadata_is_no_picture(folder, processor):
    """What only sounds like one; what names the picture that the row has; a file that is elsewhere."""
    (folder / "notes.txt").write_text("a file, but no picture")
    more = {"source": "geo/12", "file_name": "a.png", "note": "images/a.png", "size": 3, "tags": ["x", None, True],
            "video": None, "audio": "", "videos": [], "see": "notes.txt", "hash": "data: 9j/", "image_1": None}
    rows = [GOOD | more | {"id": i, "origin": f"geometry3k/train/{i}.png"} for i in range(3)]
    assert [len(s.images) for s in load(folder, rows, processor)] == [1, 1, 1]
    named = TEXT | {"id": "geo_12.png", "answer": "b.png", "solution": "It is b.png"}  # no file of a text's name
    assert load(folder, [named], processor)[0].images == []


def struct(content, path=None):
    return {"bytes": content, "path": path}


def layouts(png, other):
    """Rows as parquet files of the wild have them, and the pictures that a sample must have of each."""
    row = {"question": "How many?", "answer": "3"}
    return [
        ({"problem": "<image>How many?", "answer": "3", "images": [struct(png)]}, [png]),  # hiyouga/geometry3k
        (row | {"images": [struct(png, "a.png"), struct(other)]}, [png, other]),
        (row | {"images": [png, other]}, [png, other]),
        (row | {"images": ["images/a.png"]}, ["images/a.png"]),
        (row | {"images": struct(png)}, [png]),
        (row | {"image": struct(png), "metadata": {"source": "GEOS", "split": "testmini"}}, [png]),  # MathVerse
        (row | {"image": png}, [png]),
        (row | {"image": "images/a.png"}, ["images/a.png"]),
        (row | {"image": struct(None, "images/a.png")}, ["images/a.png"]),
        (row | {"image": [struct(png)]}, [png]),
        (row | {"image": None}, []),
        (row | {"image": struct(None), "images": []}, []),
        (row | {"image": struct(png), "images": [struct(png)]}, [png]),
        (row | {"image": "images/1.jpg", "decoded_image": struct(png, "1.jpg")}, [png]),  # MathVista
        (row | {"image": "images/a.png", "decoded_image": struct(other)}, "hold different images"),
        (row | {"image": struct(png), "decoded_image": struct(other)}, "hold different images"),
        (row | {"images": [png, other], "image": "images/1.jpg"}, "hold different images"),
        (row | {"image": b""}, "image bytes cannot be read"),
        (row | {"picture": struct(png)}, 'the field "picture" holds a picture'),
        (row | {"views": [("left", png)]}, 'the field "views" holds a picture'),  # a map
        (row | {"image": struct(png), "photo": other}, 'the field "photo" holds a picture'),
        (row | {"image_1": struct(png), "image_2": None}, 'the field "image_1" holds a picture'),  # MMMU
        (row | {"video": struct(b"1", "a.bin")}, 'the field "video" holds a video or sound')]


def check_layout(folder, load_one, wanted):
    if isinstance(wanted, str):
        with pytest.raises(utils.UserError, match=wanted) as error:
            load_one()
        assert ", row 1: " in str(error.value)
        return
    sample = load_one()
    assert sample.images == [str(folder / i) if isinstance(i, str) else i for i in wanted]
    assert sample.question == IMAGE_MARK * len(wanted) + "How many?"


@pytest.mark.parametrize("number", range(23))
def test_layouts_of_the_wild(folder, processor, number):
    """What judges columns sees a row alone: nothing here needs pyarrow."""
    row, wanted = layouts((folder / "images" / "a.png").read_bytes(), png("blue"))[number]
    path = folder / "x.parquet"
    check_layout(folder, lambda: make_sample(row, folder, f"{path}, row 1", processor), wanted)


def test_layouts_of_the_wild_in_files(folder, processor):
    path = folder / "data.parquet"
    for row, wanted in layouts((folder / "images" / "a.png").read_bytes(), png("blue")):
        table = pyarrow.Table.from_pylist([row])
        if "views" in row:
            views = pyarrow.array([row["views"]], pyarrow.map_(pyarrow.string(), pyarrow.binary()))
            table = pyarrow.table({"question": [row["question"]], "answer": [row["answer"]], "views": views})
        pyarrow.parquet.write_table(table, path)
        check_layout(folder, lambda: load_samples(path, processor, 512)[0], wanted)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([layouts(png("red"), None)[0][0]]), path)
    batch = collate(load_samples(path, processor, 512), processor)
    assert batch["inputs"]["pixel_values"].shape[0] == 16
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(utils.UserError, match="data.parquet: cannot be read .*; replace it"):
        load_samples(path, processor, 512)


@pytest.mark.parametrize("mode, value, ending, grey", [
    ("I;16", 40_000, "png", 156), ("I;16", 200, "png", 0), ("I;16", 40_000, "tiff", 156),
    ("I;16B", 40_000, "tiff", 156),
    ("I", 40_000, "tiff", 156), ("I", 200, "tiff", 200), ("I", 40_000, "pgm", 156), ("I", 200, "pgm", 0),
    ("F", 0.5, "tiff", 127), ("F", 200.0, "tiff", 200), ("F", 40_000.0, "tiff", 156), ("I", 1, "tiff", 255), ("F", 0.5, "pfm", 127),
    ("I", 70_000, "tiff", 128), ("F", -3.0, "tiff", 128), ("1", 1, "tiff", 255), ("LA", (9, 0), "png", 255)])
def test_greys_of_every_depth(folder, mode, value, ending, grey):
    """16 bits divide by 256; what has 32 bits says its range by its values."""
    Image.new(mode, (84, 84), value).save(folder / f"deep.{ending}")
    assert open_image(folder / f"deep.{ending}").getpixel((0, 0)) == (grey,) * 3


@pytest.mark.parametrize("mode, low, high", [("F", -1e9, 1e9), ("F", 0, 1e5), ("I", -5, 5), ("I", 0, 2**31 - 1)])
def test_a_grey_of_unknown_range_is_stretched(folder, mode, low, high):
    image = Image.new(mode, (84, 84), low)
    image.paste(high, (0, 0, 42, 84))
    image.paste((low + high) // 2, (0, 0, 42, 42))
    image.save(folder / "deep.tiff")
    shown = open_image(folder / "deep.tiff")
    assert [shown.getpixel(at)[0] for at in ((60, 60), (20, 20), (20, 60))] == [0, 127, 255]


def test_a_grey_that_is_no_number_is_refused(folder, processor):
    Image.new("F", (84, 84), float("nan")).save(folder / "images" / "nan.tiff")
    with pytest.raises(utils.UserError, match="nan.tiff cannot be read .*not finite"):
        load(folder, [GOOD | {"image": "images/nan.tiff"}], processor)


def test_a_deep_grey_with_a_transparent_value(folder):
    image = Image.new("I;16", (84, 84), 40_000)
    image.putpixel((0, 0), 2_000)
    image.save(folder / "deep.png", transparency=2_000)
    shown = open_image(folder / "deep.png")
    assert shown.getpixel((0, 0)) == (255,) * 3 and shown.getpixel((1, 1)) == (156,) * 3


# what a user sees of a template, a tokenizer or a processor that does not fit

PARTS = ("{{% for part in messages[0]['content'] %}}{{% if part['type'] == 'image' %}}{}{{% else %}}{}{{% endif %}}"
         "{{% endfor %}}")
PAD, ASKED = "<|image_pad|>", "{{ part['text'] }}"


@pytest.mark.parametrize("template, sentence", [
    ("{{ raise_exception('user and assistant take turns') }}", "fails .user and assistant take turns"),
    ("{{ messages[0]['content'].a.b }}", "fails .*has no attribute"),
    ("{{ 'user: ' + messages[0]['content'] }}", "fails .can only concatenate str"),  # one for text alone
    ("{% for", "fails .unexpected"),
    (PARTS.format(PAD, ""), "loses or changes the text 'How many"),
    (PARTS.format("", ASKED), "loses the images"),
    (PARTS.format(PAD * 2, ASKED), r"writes <\|image_pad\|> 2 times")])  # for one image
def test_a_template_that_does_not_fit(folder, template, sentence):
    processor = load_processor("toy_model")
    processor.chat_template = PARTS.format(PAD, "{{ part['text'] | trim }}")  # one that only strips is fine
    assert INSTRUCTION in load(folder, [GOOD | {"question": "<image> How? "}], processor)[0].prompt_text
    processor.chat_template = template
    with pytest.raises(utils.UserError, match=f"data.jsonl, line 1: the model's chat template {sentence}"):
        load(folder, [GOOD], processor)


def test_a_processor_that_crashes_for_a_row(folder, monkeypatch):
    processor = load_processor("toy_model")
    monkeypatch.setattr(type(processor), "__call__", lambda *_, **__: [][0])
    with pytest.raises(utils.UserError, match="line 1: the processor refuses the row .list index out of range"):
        load(folder, [GOOD], processor)


@pytest.mark.parametrize("token", [None, "<|image_pad|>"])
def test_a_tokenizer_without_a_pad_token(folder, token):
    """Or with an image's placeholder for one: what fills up a row is masked, and is no image's."""
    processor = load_processor("toy_model")
    processor.tokenizer.pad_token = token
    samples = load(folder, [GOOD, TEXT], processor)
    batch = collate(samples, processor)
    tail = batch["inputs"]["input_ids"][1, len(samples[1].prompt_ids) :]
    assert len(tail) and processor.image_token_id not in tail
    assert batch["inputs"]["attention_mask"].sum(1).tolist() == [len(s.prompt_ids) for s in samples]


def test_a_large_number_is_an_answer(folder, processor):
    assert load(folder, [GOOD | {"answer": 10**400}], processor)[0].answer == str(10**400)


@pytest.mark.parametrize("path", ["nowhere", "tests/nowhere", "/nowhere/at/all", "../nowhere"])
def test_a_mistyped_folder_is_not_looked_up_on_the_hub(path):
    with pytest.raises(utils.UserError, match="--model .*: no such folder; give one"):
        load_processor(path)


def test_a_folder_without_a_processor_or_model(folder, tmp_path):
    with pytest.raises(utils.UserError, match="--model .*: cannot be loaded"):
        load_processor(str(folder))
    with pytest.raises(utils.UserError, match="--model .*: cannot be loaded"):
        load_model(str(folder))


def test_a_look_at_a_data_set(folder, one_rank, capsys):
    """Rows, tokens, pictures, what is dropped, and the first prompt as the model reads it: 9 placeholders for
    84 x 84 pixels, 46 tokens in all; a row of text has fewer."""
    rows = [GOOD | {"id": "a"}, TWO | {"id": "b", "images": ["images/a.png"] * 2}, {"question": "2 + 3?", "answer": "5"}]
    path = folder / "three.jsonl"
    utils.write_jsonl(path, rows)
    lengths = sorted(len(s.prompt_ids) for s in load_samples(path, load_processor(ROOT / "toy_model"), 2048))
    args = utils.parse_args(data_flow.Args, [str(path), "--model", str(ROOT / "toy_model"), "--max_prompt_tokens",
                                             str(lengths[-1] - 1)])
    found, = data_flow.main(args).values()
    assert 0 <= found.pop("memory, kB a row") < 1e5
    short, middle, long = lengths
    shares = "0%", "25%", "50%", "75%", "95%", "100%"
    assert found == {
        "rows": 3, "images": 3, "dropped": 1, "without image": 1, "without solution": 3,
        "prompt tokens": dict(zip(shares, (short, short, middle, middle, middle, long))),
        "image width": dict.fromkeys(shares, 84), "image height": dict.fromkeys(shares, 84)}
    said = capsys.readouterr().err
    assert f"dropped, since longer than --max_prompt_tokens {lengths[-1] - 1}: b\n" in said
    assert "<|vision_start|><|image_pad|> x 9<|vision_end|>" in said and "final answer in \\boxed{}" in said
    assert said.count("<|image_pad|>") == 1


# ---------------------------------------------------------------------------------------------
# Sources: what a user has, in the form in which she has it


def as_text(content):
    return base64.b64encode(content).decode()


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", "{}", "data:image/x;name=a;base64,{}"])
def test_a_picture_may_stand_in_the_row_as_text(folder, processor, form):
    """A data URI, and bare base 64 as VLMEvalKit's tables have it."""
    content = png("blue")
    row = {"question": "How many?", "answer": "3", "image": form.format(as_text(content))}
    text = row["image"]
    lines = form.format("\n".join(as_text(content)[i : i + 76] for i in range(0, 999, 76)))
    rows = [row, row | {"image": None, "images": [text] * 2}, row | {"image": lines}]
    assert [s.images for s in load(folder, rows, processor)] == [[content], [content] * 2, [content]]


@pytest.mark.parametrize("name, content, sentence", [
    ("a.json", b' [{"question": "?", "answer": "1"}]', "a.json: it is one JSON array: write an object a line"),
    ("a.jsonl", '{"question": "?"}'.encode("utf-16"), "a.jsonl: it is UTF-16: save it as UTF-8"),
    ("a.jsonl", gzip.compress(b"{}"), "a.jsonl: it is packed: unpack it"),
    ("a.xlsx", b"PK\3\4", "a.xlsx: it is packed: unpack it"),
    ("a.csv", b"question,answer\n1,2\n", "a.csv: .csv is not read; write it as JSON lines, as pandas'"),
    ("a.TSV", b"question\tanswer\n", "a.TSV: .TSV is not read; write it"),
    ("a.jsonl", b"{\n", "a.jsonl, line 1: not valid JSON (Expecting property name enclosed in double quotes"),
    ("a.jsonl", b'{"question": "\xff"}\n', "a.jsonl, line 1: not valid JSON ('utf-8' codec"),
    ("a.bin", b"PAR1 torn", "a.bin: cannot be read (")])
def test_other_formats_are_told_apart(tmp_path, processor, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(utils.UserError) as error:
        load_samples(tmp_path / name, processor, 512)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source, sentence", [
    ("nowhere/at/all.jsonl", "no such file or folder"), ("nowhere/at:train:x:y", "no such file or folder"),
    ("hiyouga/geometry3k", "as hiyouga/geometry3k:train"), ("toy_data/x:train", "no such file or folder"),
    ("toy_data", "toy_data: a folder; give one of its files, as toy_data/test.jsonl"),
    ("tests/exercises", "tests/exercises: cannot be read")])
def test_a_source_that_is_none(processor, source, sentence):
    with pytest.raises(utils.UserError, match=sentence):
        load_samples(source, processor, 512)


def shards(folder, **counts):
    """A folder as the hub's have it: data/SPLIT-00000-of-00002.parquet, pictures by `datasets`' own feature."""
    import datasets

    (folder / "data").mkdir(parents=True)
    features = datasets.Features({"problem": datasets.Value("string"), "answer": datasets.Value("string"),
                                  "images": datasets.Sequence(datasets.Image())})
    for split, count in counts.items():
        for i in range(count):
            rows = [{"problem": f"<image>{split} {i} {k}?", "answer": "1",
                     "images": [{"bytes": png("red"), "path": None}]} for k in range(2)]
            table = datasets.Dataset.from_list(rows, features=features)
            table.to_parquet(folder / "data" / f"{split}-{i:05d}-of-{count:05d}.parquet")
    return folder


def test_a_folder_of_shards(tmp_path, processor):
    """All shards of a split, in order; several splits are asked for by name, and nothing is copied."""
    folder = shards(tmp_path / "set", train=2, test=1, validation=1)
    asked = [s.question for s in load_samples(f"{folder}:train", processor, 512)]
    assert asked == [f"<image>train {i} {k}?" for i in range(2) for k in range(2)]
    (sample, _) = load_samples(folder / "data" / "test-00000-of-00001.parquet", processor, 512)
    (tmp_path / "paths" / "data").mkdir(parents=True)
    (tmp_path / "paths" / "data" / "a.png").write_bytes(png("red"))
    table = pyarrow.Table.from_pylist([{"question": "?", "answer": "1", "image": "data/a.png"}])
    for split in ("train", "test"):
        pyarrow.parquet.write_table(table, tmp_path / "paths" / "data" / f"{split}.parquet")
    assert load_samples(f"{tmp_path / 'paths'}:test", processor, 512)[0].images == [str(tmp_path / "paths" / "data" / "a.png")]
    assert sample.images == [png("red")] and sample.place == f"{folder}/data/test-00000-of-00001.parquet, row 1"
    for source in (folder, f"{folder}:trian"):
        with pytest.raises(utils.UserError, match="give one of its splits, as .*set:train; it has train, validation, test"):
            load_samples(source, processor, 512)
    for path in (folder / "data").glob("*[an]-0000*"):
        path.unlink()
    assert len(load_samples(folder, processor, 512)) == 2


def test_what_a_source_names(tmp_path, processor):
    """The longest path that is there, then a split, perhaps a configuration before; a file has none."""
    folder = shards(tmp_path / "co:lon", train=1, test=1)
    assert [s.question for s in load_samples(f"{folder}:test", processor, 512)] == [f"<image>test 0 {k}?" for k in range(2)]
    path = folder / "data" / "test-00000-of-00001.parquet"
    path.rename(folder / "data" / "a:b.parquet")
    assert len(load_samples(folder / "data" / "a:b.parquet", processor, 512)) == 2
    for source, sentence in ((f"{folder}/data/a:b.parquet:train", "a file has no splits; give .*a:b.parquet"),
                             (f"{tmp_path}/co:train", "no such file or folder"), ("a/b:c:d:e", "no such file or folder")):
        with pytest.raises(utils.UserError, match=sentence):
            load_samples(source, processor, 512)


@pytest.mark.parametrize("name, content", [
    ("a.csv", "question,answer\n?,007\n?,0.50\n"), ("x/a.jsonl", '{"question": "?", "answer": "3"}\n'),
    ("a.json", '[{"question": "?", "answer": "3"}]'), ("a.txt", "question\n")])
def test_a_folder_of_other_files_is_refused(tmp_path, processor, name, content):
    """`datasets` would read 007 as 7.0, and "x" beside 3 with its quotes."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(utils.UserError, match="a folder; give one of its files, as .*json|a folder of (csv|text) files, of"):
        load_samples(tmp_path, processor, 512)


def test_limit_reads_no_further(folder, processor):
    """What stands after the rows that are asked for is not looked at; long ones among them count."""
    rows = [GOOD | {"id": i, "question": "<image>How? " + "many " * i} for i in range(4)]
    kept = load(folder, [*rows, "{broken\n"], processor, 512, "", INSTRUCTION, "", 4)
    assert [s.id for s in kept] == ["0", "1", "2", "3"]
    with pytest.raises(utils.UserError, match="line 5"):
        load(folder, [*rows, "{broken\n"], processor, 512, "", INSTRUCTION, "", 5)


def test_columns_of_another_name(folder, processor):
    """Their columns under our names; what ours replaced is not lost without a word, nor is a typing mistake."""
    row = {"prompt": "How many?", "question": "no", "gold": 3, "picture": "images/a.png", "uid": "x"}
    columns = "question=prompt, answer=gold,image=picture,id=uid"
    (sample,) = load(folder, [row], processor, 512, columns)
    assert (sample.question, sample.answer, sample.id) == ("<image>How many?", "3", "x")
    assert sample.images == [str(folder / "images" / "a.png")]
    swapped = {"question": "3", "answer": "How many?", "image": "images/a.png"}
    (sample,) = load(folder, [swapped], processor, 512, "question=answer,answer=question")
    assert (sample.question, sample.answer) == ("<image>How many?", "3")
    mixed = [row, {n: row[n] for n in ("prompt", "gold")} | {"uid": "y"}]  # a row without a picture
    assert [len(s.images) for s in load(folder, mixed, processor, 512, columns)] == [1, 0]
    for text, sentence in (
            ("question=promt", "data.jsonl, line 1: no promt, which --columns names; it has prompt, question, gold, picture, uid."),
            (columns.replace("uid", "name"), "data.jsonl: no row has name, which --columns names; they have gold, "),
            ("question=prompt", 'line 1: field "answer" is missing, empty or no text; correct it, or name the right'),
            ("question=prompt,answer=gold", 'the field "picture" holds a picture .* by --columns image=picture'),
            ("image=gold," + columns, "each once, or images=THEIRS"), ("asked=prompt", "ours are question, answer, solution"),
            ("question", "give OURS=THEIRS"), ("question=", "give OURS=THEIRS")):
        with pytest.raises(utils.UserError, match=sentence):
            load(folder, [row], processor, 512, text)
    both = {"question": "?", "answer": "1", "image": "images/a.png", "shown": "images/line.png"}
    with pytest.raises(utils.UserError, match='the field "image, not in --columns" holds a picture'):
        load(folder, [both], processor, 512, "image=shown")


def test_the_instruction_ends_every_prompt(folder, processor):
    own, none = (load(folder, [GOOD], processor, 512, "", text)[0] for text in ("Be {short}.", " "))
    assert "How many?\nBe {short}.<|im_end|>" in own.prompt_text
    assert "How many?<|im_end|>" in none.prompt_text
    with pytest.raises(utils.UserError, match=r"the --instruction holds the model's mark <\|im_end\|>; remove it"):
        load(folder, [GOOD], processor, 512, "", "Think.<|im_end|>")
    with pytest.raises(utils.UserError, match="the --instruction holds <image>; it is for every prompt"):
        load(folder, [GOOD], processor, 512, "", "Look at <image>.")
    stages = [importlib.import_module(n) for n in ("rollout", "doctor", "train_grpo", "train_sft", "evaluate", "data")]
    assert {stage.Args().instruction for stage in stages} == {INSTRUCTION}


# ---------------------------------------------------------------------------------------------
# Pixels: bounds that hold for the trainer and both samplers


def test_bounds_on_an_images_pixels(folder, tmp_path):
    """84 x 84 pixels are 9 tokens of 28 x 28; 2,000 pixels hold two of them and no third."""
    tokens = {}
    for least, most in ((0, 0), (0, 2000), (20_000, 0), (0, 84**2), (100, 0), (60_000, 0)):
        processor = load_processor("toy_model", least, most)
        ids = load(folder, [GOOD], processor)[0].prompt_ids
        tokens[least, most] = ids.count(processor.image_token_id)
        batch = collate(load(folder, [GOOD], processor), processor)["inputs"]  # the trainer sees what was counted
        assert batch["image_grid_thw"].prod().item() == 4 * tokens[least, most]
        processor.save_pretrained(tmp_path / "saved")  # and so does whoever loads the checkpoint
        again = load_processor(tmp_path / "saved")
        assert load(folder, [GOOD], again)[0].prompt_ids == ids
    assert tokens == {(0, 0): 9, (0, 2000): 1, (20_000, 0): 36, (0, 84**2): 9, (100, 0): 9, (60_000, 0): 81}
    assert load_processor("toy_model", 60_000).image_processor.size == dict.fromkeys(("shortest_edge", "longest_edge"), 60_000)
    bound_pixels(processor, "", 0, 2000)  # which is less than the 60,000 of before
    assert processor.image_processor.size == dict.fromkeys(("shortest_edge", "longest_edge"), 2000)
    for least, most in ((0, 700), (3000, 2000)):
        with pytest.raises(utils.UserError, match=f"--max_pixels {most} must be at least --min_pixels {least}, and 784"):
            load_processor("toy_model", least, most)


# ---------------------------------------------------------------------------------------------
# Checking: nothing that cannot be decoded gets past it, and ranks speak with one voice


@functools.cache
def photo(mode="RGB", **how):
    """A JPEG file with something in it."""
    file = io.BytesIO()
    Image.effect_noise((70, 50), 60).resize((210, 150)).convert(mode).save(file, "jpeg", **how)
    return file.getvalue()


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0, "optimize": True}, {"mode": "L"},
                                 {"mode": "CMYK"}, {"restart_marker_rows": 1}])
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(data=st.data())
def test_a_jpeg_is_checked_as_if_it_were_decoded(how, data):
    """Cut off anywhere or with bytes changed anywhere: refused where decoding it would fail, and nowhere else."""
    whole = bytearray(photo(**how))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for place, byte in data.draw(st.dictionaries(st.integers(0, len(whole)), st.integers(0, 255), max_size=9)).items():
        whole[place : place + 1] = bytes([byte])
    found = size_or_problem(bytes(whole))
    try:
        decoded = open_image(bytes(whole)).size
    except Exception:  # Pillow's plug-ins raise what they like
        assert isinstance(found, str) and "image bytes cannot be read" in found
    else:
        assert found == decoded


@pytest.mark.parametrize("turn", range(1, 9))
def test_sizes_are_those_of_the_decoded_picture(tmp_path, turn):
    """Cameras write the turn beside the pixels: 5 to 8 change width and height."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    for kind in ("jpeg", "png", "webp", "tiff"):
        path = tmp_path / f"a.{kind}"
        Image.new("RGB", (30, 20), "red").save(path, exif=exif)
        assert size_or_problem(str(path)) == open_image(path).size == ((20, 30) if turn > 4 else (30, 20))


def sizes_on_two_ranks(folder):
    opened = []
    honest = pictures.size_or_problem
    pictures.size_or_problem = lambda image: opened.append(image) or honest(image)
    utils.start_ranks()
    found = pictures.picture_sizes([str(p) for p in sorted(Path(folder[0]).glob("*.png"))] * 2)
    said = json.dumps([len(opened), sorted([Path(p).name, size] for p, size in found.items())])
    print(f"{said}\n", end="", flush=True)  # in one write, where stdout has no buffer: both ranks write to it


def test_ranks_share_the_checking(tmp_path):
    """Five pictures, each opened once, and by each rank all sizes known."""
    for i in range(5):
        Image.new("RGB", (30 + i, 20)).save(tmp_path / f"{i}.png")
    codes, out, err = fork(tmp_path, act=sizes_on_two_ranks, ranks=2)
    assert codes == [0, 0], err
    (few, one), (many, other) = sorted(map(json.loads, out.splitlines()))
    assert (few, many) == (2, 3) and one == other == [[f"{i}.png", [30 + i, 20]] for i in range(5)]


def blind_rank_1():
    """The second machine has no copy of the pictures."""
    if utils.rank() == 1:
        honest = pictures.located
        pictures.located = lambda image, folder: honest(image, "/nowhere/at/all")


def test_a_mistake_that_one_rank_alone_sees_is_told(data, tmp_path):
    codes, _, err = fork("rollout.py", "--data", data / "train.jsonl", "--out", tmp_path / "run", "--limit", 4,
                         "--model", ROOT / "toy_model", ranks=2, fault=blind_rank_1)
    assert codes == [2, 2] and "does not exist in" in err and err.count("rollout.py: ") == 1
    assert not (tmp_path / "run").exists()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=9)
    | st.sampled_from(["images/a.png", "images/none.png", "../a.png", "<image>", "<image 2>", "a.mp4", "\ud800",
                       "<|im_end|>", "data:image/png;base64,", "/9j/" * 40, "\0", "http://a/b.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    | st.fixed_dictionaries({"bytes": inner, "path": inner}), max_leaves=5)
NAMES = st.sampled_from(["question", "problem", "answer", "solution", "id", "image", "images", "decoded_image", "video",
                         "options"]) | st.text("ab_1 ", max_size=5)


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_row_ends_in_a_traceback(folder, processor, examples):
    """A row becomes a sample with as many pictures as marks, or one sentence that names its place."""
    @hypothesis.settings(max_examples=examples, deadline=None)
    @hypothesis.given(row=st.dictionaries(NAMES, JUNK, max_size=5), sane=st.booleans())
    def holds(row, sane):
        row = (GOOD if sane else {}) | row
        try:
            sample = make_sample(row, folder, "x.jsonl, line 7", processor)
        except utils.UserError as error:
            assert str(error).startswith("x.jsonl, line 7: ") and len(str(error).splitlines()) == 1, row
        else:
            assert sample.question.count(IMAGE_MARK) == len(sample.images) and sample.prompt_ids

    holds()


@hypothesis.settings(max_examples=100, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(content=st.binary(max_size=200) | st.text(alphabet='{}[]":,\\ na1\n\r\t', max_size=60).map(str.encode),
                  name=st.sampled_from(["a.jsonl", "a.json", "a.parquet", "a", "a.csv"]))
def test_no_file_ends_in_a_traceback(folder, processor, content, name):
    (folder / name).write_bytes(content)
    with pytest.raises(utils.UserError) as error:
        load_samples(folder / name, processor, 512)
    assert name in str(error.value) and len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Written: answered samples are rows again


def said(sample, *texts):
    """The sample with each of these completions."""
    return [replace(sample, completion_text=text) for text in texts]


def test_answers_are_written_as_rows_of_the_same_prompts(folder, processor, tmp_path):
    """Pictures of files and of parquet, several, none, alone; texts that would make another mark of one before them."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (112, 56), "blue").save(folder / "images" / "b.jpg", exif=turned, quality=40)
    rows = [GOOD | {"question": "> 5?"}, TWO | {"images": ["images/b.jpg", "images/a.png"], "id": "a-1"},
            TWO | {"question": "this <image> or\n<image> that", "images": ["images/a.png", "images/b.jpg"]},
            GOOD | {"question": "<image>", "id": 7, "answer": 20.50}, TEXT | {"question": " \u00e9\u2028 $<$ ?"}]
    samples = load(folder, rows, processor)
    table = pyarrow.Table.from_pylist([{"problem": "$>$?", "answer": "1", "images": [{"bytes": png("red"), "path": None}] * 2}])
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    samples += load_samples(folder / "a.parquet", processor, 512)
    out = tmp_path / "out"
    done = [answer for s in samples for answer in said(s, *["\\boxed{1}"] * 2, "so \\boxed{1}", "then \\boxed{1}")]
    assert write_rows(out / "right.jsonl", done, 2) == 12
    files = [path.read_bytes() for path in (out / "images").iterdir()]
    assert sorted(files) == sorted([*((folder / "images" / name).read_bytes() for name in ("a.png", "b.jpg")), png("red")])
    shutil.rmtree(folder / "images")
    shutil.move(out, tmp_path / "moved")
    again = load_samples(tmp_path / "moved" / "right.jsonl", processor, 512)
    assert [s.solution for s in again] == ["\\boxed{1}", "so \\boxed{1}"] * 6
    assert [s.id for s in again[:4]] == ["a-1", "a-2", "a-1-1", "a-1-2"]
    for before, after in zip([s for s in samples for _ in range(2)], again, strict=True):
        assert (after.question, after.answer, after.prompt_ids) == (before.question, before.answer, before.prompt_ids)
        assert len(after.images) == len(before.images)


def test_one_answer_a_prompt_keeps_its_id_and_none_leaves_no_file(folder, processor, tmp_path):
    samples = load(folder, [GOOD, TEXT], processor)
    path = tmp_path / "out" / "right.jsonl"
    assert write_rows(path, [a for s in samples for a in said(s, "3", "4")], 1) == 2
    assert [s.id for s in load_samples(path, processor, 512)] == [s.id for s in samples]
    assert write_rows(path, [], 1) == 0 and not path.exists()


PIECES = st.sampled_from([IMAGE_MARK, "<", ">", "|", "image", " ", "\n", "$", "img", "!", "[", "](", "a", "1", "/", "\u00e9"])


@hypothesis.settings(max_examples=150, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(words=st.lists(PIECES, min_size=1, max_size=6), count=st.integers(0, 2))
@hypothesis.example(words=[">"], count=1)
@hypothesis.example(words=["$", ">", "a"], count=2)
def test_any_question_that_is_read_is_read_again(folder, processor, words, count):
    row = TEXT | {"question": "".join(words), "images": ["images/a.png"] * count}
    try:
        samples = load(folder, [row], processor)
    except utils.UserError:
        return
    write_rows(folder / "again" / "right.jsonl", said(samples[0], "2"), 2)
    (again,) = load_samples(folder / "again" / "right.jsonl", processor, 512)
    assert (again.question, again.prompt_ids) == (samples[0].question, samples[0].prompt_ids)


# ---------------------------------------------------------------------------------------------
# The hub: a stand-in on this machine, as `datasets` asks for it


class Hub(http.server.BaseHTTPRequestHandler):
    """somebody/shapes, one commit: the files of `folder`; every other name is unknown."""

    folder = None

    def do_GET(self):
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*.parquet")}
        path, body, more = self.path.partition("?")[0], b"", {}
        api = re.fullmatch(r"/api/datasets/somebody/shapes(/.*)?", path)
        tree = re.fullmatch(r"/api/datasets/somebody/shapes/tree/\w+/?(.*)", path)
        file = re.fullmatch(r"/datasets/somebody/shapes/resolve/\w+/(.*)", path)
        if tree:
            found = [{"type": "file", "path": name, "size": p.stat().st_size, "oid": "0" * 40}
                     for name, p in files.items() if os.path.dirname(name) == tree[1]]
            found += [] if tree[1] else [{"type": "directory", "path": "data", "oid": "0" * 40}]
            body = json.dumps(found).encode()
        elif api:
            body = json.dumps({"id": "somebody/shapes", "sha": "1" * 40, "tags": [], "downloads": 0, "private": False,
                               "siblings": [{"rfilename": name} for name in files]}).encode()
        elif file and file[1] in files:
            body, more = files[file[1]].read_bytes(), {"ETag": f'"{"2" * 64}"', "X-Repo-Commit": "1" * 40}
        else:
            more = {"X-Error-Code": "EntryNotFound" if file else "RepoNotFound", "X-Repo-Commit": "1" * 40}
        self.send_response(200 if body else 404)
        for name, value in (more | {"Content-Length": str(len(body)), "Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        """Nothing is said."""


def look(source, hub, home):
    """`python data.py SOURCE`, as a user starts it: what it ends with, and what it says."""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE")
    done = subprocess.run([sys.executable, "data.py", source], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_set_of_the_hub(tmp_path):
    """Downloaded once, into the hub's cache; then, without a network, taken from there."""
    Hub.folder = shards(tmp_path / "set", train=2, test=1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub, home = f"http://127.0.0.1:{server.server_port}", tmp_path / "home"
    code, out, err = look("somebody/shapes:train", hub, home)
    assert code == 0, err
    (found,) = json.loads(out.splitlines()[-1]).values()
    assert (found["rows"], found["images"], found["without image"]) == (4, 4, 0)
    code, _, err = look("somebody/shapes:trian", hub, home)
    assert code == 2 and 'somebody/shapes:trian: cannot be read (ValueError: Unknown split "trian"' in err
    server.shutdown()
    server.server_close()
    code, out, err = look("somebody/shapes:train", hub, home)
    assert code == 0, err
    (again,) = json.loads(out.splitlines()[-1]).values()
    assert [found.pop("memory, kB a row"), again.pop("memory, kB a row")] and again == found
    assert re.search(r"somebody/shapes: the hub cannot be reached \(.*\); taken from the hub's cache", err)
