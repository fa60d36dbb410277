"""Pictures: found in a row, checked before step 1, decoded when they are needed, and never lost.

Somebody else's row may hold a picture under any name and in any form. It is used, or the row is
refused by that name: a model that is shown nothing learns to guess, and no metric tells. Left out:
video, and addresses that would have to be fetched. Nothing here knows a model.
"""

import utils  # first: from here on Ctrl-C is no traceback

import base64
import binascii
import io
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from utils import UserError, first_line, rank, world_size

PICTURES = ("images", "image", "decoded_image")  # the fields whose pictures a row is about
ENCODED = re.compile(r"data:image/|iVBORw0KGgo|/9j/|R0lGOD|UklGR")  # how one begins as text
# a text that is a picture (group 1) or the name of one; a video or a sound
PICTURE = re.compile(rf"^({ENCODED.pattern})|\.(png|jpe?g|gif|bmp|tiff?|webp"
                     r"|avif|heic|jp2|p[gp]m|svg)(\?\S*)?$", re.I)
VIDEO = re.compile(r"^data:(video|audio)/|\.(mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|wav|mp3|flac"
                   r"|ogg|m4a)(\?\S*)?$", re.I)


# ---------------------------------------------------------------------------------------------
# Found: every picture of a row is used, or the row is refused


def row_images(row, folder):
    """The pictures of a row, each as an absolute path in `folder` or as bytes, not yet opened.

    UserError where fields disagree, or one is no picture's.
    """
    given = {}
    for name in PICTURES:
        value = row.get(name)
        if name == "images" and isinstance(value, str):
            raise UserError("images must be a list of paths; correct it.")
        if any(True for _ in leaves(value)):
            given[name] = [source(part) for part in (value if type(value) is list else [value])]
    held = next((ps for ps in given.values() if all(isinstance(p, bytes) for p in ps)), None)
    if held:  # beside them, names of files that are not there are metadata, as in MathVista
        given = {name: parts for name, parts in given.items()
                 if not (nowhere(parts, folder) and len(parts) == len(held))}
    first = next(iter(given.values()), [])
    if any(parts != first for parts in given.values()):
        raise UserError(f"{' and '.join(given)} hold different images; keep one of them.")
    return [part if isinstance(part, bytes) else located(part, folder) for part in first]


def source(part):
    """A picture's bytes or its path, of what a field holds: a struct, a text in base 64, or these.

    In a struct as `datasets` writes it, the path is a mere name where there are bytes.
    """
    if isinstance(part, dict) and part.keys() & {"bytes", "path"}:
        part = part.get("path") if part.get("bytes") is None else part["bytes"]
    if isinstance(part, str) and ENCODED.match(part) and (len(part) > 99 or part[:5] == "data:"):
        try:
            return base64.b64decode(part.partition(";base64,")[2] or part, validate=True)
        except binascii.Error as error:
            raise UserError(f"an image in base 64 cannot be read ({error}; {part:.40}...); encode "
                            "it again.")
    return part


def nowhere(parts, folder):
    return all(isinstance(p, str) and not os.path.isfile(os.path.join(folder, p)) for p in parts)


def located(image, folder):
    """The absolute path of a row's image; UserError where that is no file inside `folder`.

    Inside as it is written: where a link leads is its owner's affair, and the hub's cache has
    nothing but links.
    """
    if not isinstance(image, str) or re.search("[\0\ud800-\udfff]", image):
        raise UserError(f"an image is given as {image!a:.60}; give its path as text.")
    if re.match(r"\w+://", image):
        raise UserError(f"image {image:.100} is an address; download it, and give its path.")
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, image))
    if os.path.commonpath([root, path]) != root:
        raise UserError(f"image {image:.100} lies outside {folder}; move it inside, or give a "
                        "folder above it as --image_root.")
    if not os.path.isfile(path):
        raise UserError(f"image {image:.100} does not exist in {folder}; correct the path, or give "
                        "the folder that it begins from as --image_root.")
    return path


def refuse_lost_images(row, read, images, folder):
    """UserError where a field that nobody reads holds a picture, a video or a sound.

    The name of a file that is not there is metadata where the row has its pictures and the field
    has no picture's name.
    """
    known = [text for name in PICTURES for text in leaves(row.get(name)) if isinstance(text, str)]
    known = {*known, *map(os.path.basename, known)}
    for name, leaf in ((n, leaf) for n in row if n not in read for leaf in leaves(row[n])):
        text = leaf if isinstance(leaf, str) else ""
        what = f'the field "{name}" holds'
        if VIDEO.search(text) or re.fullmatch("(video|audio)s?", name, re.I) and leaf:
            raise UserError(f"{what} a video or sound ({leaf!a:.40}); only text and images are "
                            "read, remove the row.")
        looks, file = PICTURE.search(text), os.path.join(folder, text)
        named = re.fullmatch(r"(image|img|picture|pic|photo|figure)s?_?\d*", name, re.I)
        lost = looks and (not images or looks[1] or named or os.path.isfile(file))
        if leaf not in known and (isinstance(leaf, bytes) or lost or is_image(file)):
            raise UserError(f"{what} a picture ({leaf!a:.40}) that would be lost; name the field "
                            f"by --columns image={name}, or remove it.")


def leaves(value):
    """What a field holds in its lists, maps and structs, however deep; not None, not ""."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, (dict, list, tuple)):
            stack.extend(value.values() if isinstance(value, dict) else value)
        elif value is not None and value != "":
            yield value


def is_image(file):
    """Whether there is a file that begins as a picture does."""
    if not os.path.isfile(file):
        return False
    try:
        Image.open(file).close()
    except Exception:  # Pillow's plug-ins raise what they like
        return False
    return True


# ---------------------------------------------------------------------------------------------
# Checked: each picture is read to its end once, on some rank, before anything depends on it


def picture_sizes(images):
    """`{image: (width, height)}` of paths and bytes; in place of a size, what is wrong. COLLECTIVE.

    Each picture is read by one rank, in one of its threads, of which it has one a core.
    """
    images = list(dict.fromkeys(images))
    mine = images[rank() :: world_size()]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = list(tqdm(pool.map(size_or_problem, mine), "Checking pictures", len(mine),
                          leave=False, delay=2, mininterval=1, disable=rank() > 0 or None))
    order = [image for r in range(world_size()) for image in images[r :: world_size()]]
    return dict(zip(order, utils.gather(found), strict=True))


def size_or_problem(image):
    """A picture's (width, height) as `open_image` has them, or a sentence on why it cannot be."""
    try:
        picture = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        size = picture.size
        if picture.format != "JPEG" or picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return open_image(image).size
        # at an eighth of its size all of a JPEG file is read, and most of the decoding saved
        picture.draft("L", (1, 1))
        picture.load()
        return size
    except Exception as error:  # Pillow's plug-ins raise what they like
        name = "image bytes" if isinstance(image, bytes) else f"image {image}"
        return f"{name} cannot be read ({first_line(error)}); replace it."


# ---------------------------------------------------------------------------------------------
# Decoded


def open_image(source):
    """Decode a path or bytes to RGB: EXIF rotation applied, transparency laid on white."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return grey_of_8_bits(image, [65535] if deep else [1, 255, 65535]).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_of_8_bits(image, tops):
    """A grey picture of 16 or 32 bits, which Pillow's own conversion would clip to white or black.

    32 bits do not say their range: it ends at the first of `tops` that holds all values. Where none
    does, they are stretched from the lowest to the highest.
    """
    values = np.asarray(image, float)
    low, high = values.min(), values.max()
    if not math.isfinite(high - low):
        raise ValueError("it holds values that are not finite")
    top = next((top for top in tops if 0 <= low and high <= top), None)
    if top:
        low, high = 0, min(top, 255 * 256)  # of 16 bits the upper 8
    grey = (values - low) * 255 / (high - low) if high > low else values * 0 + 128
    grey[values == image.info.get("transparency")] = 255  # laid on white, as above
    return Image.fromarray(grey.astype(np.uint8))


def as_png(image):
    """The bytes of an image as a data set's file would hold them."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
