"""Pictures: found in a row, checked before step 1, decoded when they are needed, and never lost.

Somebody else's row may hold a picture under any name and in any form. It is used, or the row is
refused by that name: a model that is shown nothing learns to guess, and no metric tells. Left out:
video, and addresses that would have to be fetched. Nothing here knows a model.
"""

import utils  # first: from here on Ctrl-C is no traceback

import base64
import binascii
import hashlib
import io
import math
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from utils import UserError, first_line, rank, world_size

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # far larger ones are refused
PICTURES = ("images", "image", "decoded_image")  # the fields whose pictures a row is about
# how a picture begins as text: an address that holds it, or base 64 of PNG, JPEG, GIF, WebP, TIFF
ENCODED = re.compile(r"data:image/|data:[^,]{0,80};base64,"
                     "|iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK")
# a text that is a picture (group 1) or ends in the name of one, perhaps as the text of a list
PICTURE = re.compile(rf"^\W*({ENCODED.pattern}|<svg\b)|\w\.(png|jpe?g|gif|bmp|tiff?|webp"
                     r"|avif|heic|jp2|p[gp]m|svg)(\?[^\s?]*)?[\s\"'\])>;,|]*$", re.I)
VIDEO = re.compile(r"^data:(video|audio)/|\w\.(mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|wav|mp3|flac"
                   r"|ogg|m4a)(\?[^\s?]*)?$", re.I)
# a picture within a text: in Markdown, HTML, LaTeX, or as an address that holds it
WRITTEN = re.compile(r"!\[[^\]]*\]\(|<img\b[^>]*\bsrc|\\includegraphics|data:image/", re.I)
# a field of such a name holds pictures; with the ending, something of theirs
FIELD = r"(image|img|picture|pic|photo|figure|screenshot)s?_?\d*"
ABOUT = FIELD + r"(_?(url|uri|path|id|file|name|file_?name|bytes|b64|base64)s?)?"


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
            text = part.partition(";base64,")[2] or part
            return base64.b64decode("".join(text.split()), validate=True)  # may come in lines
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
    odd = "[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # would break the sentence, or its encoding
    if not isinstance(image, str) or re.search(odd, image):
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


def refuse_lost_images(row, shown, read, images, folder):
    """UserError where a field holds a picture, a video or a sound that nobody would see.

    `shown` names the fields whose pictures, found before, are `images`; `read` those that are read
    as text. The name of a file that is not there is metadata where the row has its pictures and the
    field has no picture's name.
    """
    known = {text for name in shown for text in leaves(row.get(name)) if isinstance(text, str)}
    known |= {name for name in map(os.path.basename, known)
              if not os.path.isfile(os.path.join(folder, name))}  # else it is another picture
    lost = {}  # field: its first picture
    for name, leaf in ((n, leaf) for n in row if n not in shown for leaf in leaves(row[n])):
        text = leaf if isinstance(leaf, str) else ""
        if name in read:  # what an id or an answer names is a picture where the row has no other
            found = text and not images and (is_image(os.path.join(folder, text)) or is_held(text))
        elif VIDEO.search(text) or re.fullmatch("(video|audio)s?", name, re.I):
            raise UserError(f'the field "{name}" holds a video or sound ({leaf!a:.40}); only text '
                            "and images are read, remove the row.")
        else:  # without images, what such a field holds is an address, a number or pixels of one
            found = (isinstance(leaf, bytes) or text and is_picture(text, name, images, folder)
                     or not images and re.fullmatch(ABOUT, name, re.I))
        if found and leaf not in known:
            lost.setdefault(name, leaf)
    if lost:
        name, leaf = next(iter(lost.items()))
        every = [n for n in shown if any(True for _ in leaves(row.get(n)))] + [*lost]
        way = f"name it by --columns image{'s' * (len(every) > 1)}={'+'.join(every)}, or remove it"
        nested = any(isinstance(row[n], dict) and not row[n].keys() & {"bytes", "path"}
                     for n in lost)
        raise UserError(f'the field "{name}" holds a picture ({leaf!a:.40}) that would be lost; '
                        f"{'remove it' if nested or {*lost} & {*read} else way}.")


def is_picture(text, name, images, folder):
    """Whether a text, of the field `name` beside `images`, is a picture or the name of one."""
    file = os.path.join(folder, text)
    another = name not in PICTURES and re.fullmatch(FIELD, name, re.I)  # as image_2 is
    return (PICTURE.search(text) and (not images or another or os.path.isfile(file))
            or is_image(file) or is_held(text))


def is_held(text):
    """Whether a text is a picture itself: an address that holds it, or base 64 of any kind."""
    if (looks := PICTURE.search(text)) and looks[1]:
        return True
    if len(text) < 100 or " " in text.strip() or not re.fullmatch(r"[A-Za-z0-9+/=\s]+", text):
        return False
    try:
        return is_image(io.BytesIO(base64.b64decode(text)))
    except binascii.Error:
        return False


def leaves(value):
    """What a field holds in its lists, maps and structs, however deep; not None, not "".

    A map's key is held too where it is a picture's name.
    """
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend([*value.values(), *(k for k in value if PICTURE.search(str(k)))])
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
        elif value is not None and value != "":
            yield value


def is_image(file):
    """Whether there is a file, of this path or open, that begins as a picture does."""
    if isinstance(file, str) and not os.path.isfile(file):
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
    name = "image bytes" if isinstance(image, bytes) else f"image {image}"
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            size, turn = picture.size, picture.getexif().get(ExifTags.Base.Orientation, 1)
            count = getattr(picture, "n_frames", 1)
            if count > 1 and picture.format != "MPO":  # a camera's, whose others are previews
                return f"{name} holds {count} pictures, one after the other; save the one meant."
            if picture.format != "JPEG" or turn != 1:
                return open_image(image).size
            # at an eighth of its size all of a JPEG file is read, and most of the decoding saved
            picture.draft("L", (1, 1))
            picture.load()
            return size
    except Exception as error:  # Pillow's plug-ins raise what they like
        return f"{name} cannot be read ({first_line(error)}); replace it."


# ---------------------------------------------------------------------------------------------
# Decoded, and copied


def open_image(source):
    """Decode a path or bytes to RGB: EXIF rotation applied, transparency laid on white."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
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


def stored(image, folder):
    """Copy a picture, a path or bytes, into a folder under a name of its bytes; give that name."""
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        kind = {"JPEG": "jpg"}.get(picture.format, picture.format.lower())
    name = f"images/{hashlib.sha256(content).hexdigest()[:20]}.{kind}"
    if not (folder / name).exists():
        utils.write_bytes(folder / name, content)
    return name
