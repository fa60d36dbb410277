"""Sources: where the rows of a data set come from, as dictionaries, each with its place.

A file of JSON lines or, read by `datasets` (pyarrow for a single file), parquet, a folder of
shards, or a set of the hub, which its cache keeps. Left out: CSV and folders of anything else,
where a reader would have to guess types, and 007 would become 7. Nothing here knows a model.
"""

import utils  # first: from here on Ctrl-C is no traceback

import functools
import json
import re
from pathlib import Path

from pictures import PICTURES
from utils import UserError, first_line, print0


# ---------------------------------------------------------------------------------------------
# Rows


def read_rows(source):
    """Yield `(place, row)` for every row of a data set; `place` is for messages.

    A source is a file of JSON lines or of parquet or, read by `datasets`, a folder of shards or an
    id of the hub; SPLIT or CONFIG:SPLIT follows a colon where there are several.
    """
    path = utils.find(source)
    if not path.is_file():
        return read_tables(source)
    with open(path, "rb") as file:
        start = file.read(512).lstrip()
    if path.suffix == ".parquet" or start.startswith(b"PAR1"):
        return read_tables(str(path))
    remedies = {(b"[",): "it is one JSON array: write an object a line, as `jq -c .[]` does",
                (b"\xff\xfe", b"\xfe\xff"): "it is UTF-16: save it as UTF-8",
                (b"PK", b"\x1f\x8b"): "it is packed: unpack it"}
    for marks, remedy in remedies.items():
        if start.startswith(marks):
            raise UserError(f"{path}: {remedy}.")
    if path.suffix.lower() in (".csv", ".tsv", ".txt", ".arrow"):
        raise UserError(f"{path}: {path.suffix} is not read; write it as JSON lines, as pandas' "
                        "to_json(orient='records', lines=True) does, or as parquet.")
    return read_json_lines(path)


def read_json_lines(path):
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            place = f"{path}, line {n}"
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=unlike_fields)
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, brackets for ever
                raise UserError(f"{place}: not valid JSON ({error}); one object a line is wanted: "
                                "correct or remove the line.")
            if not isinstance(row, dict):
                raise UserError(f"{place}: not a JSON object with question and answer; correct it.")
            yield place, row


def unlike_fields(pairs):
    """A JSON object, of whose fields Python would keep the last one of a name."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("two fields have one name")
    return row


def read_tables(source):
    """The rows of what pyarrow or `datasets` loads, pictures as they lie there: bytes or paths."""
    name, words = named(source)
    path = Path(name)
    hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(path.parts[0]).exists()
    if not path.exists() and not (hub_id and 1 <= len(words) <= 2):
        raise UserError(f"{source}: no such file or folder; give the path of JSON lines or of "
                        "parquet, or a hub id with its split, as hiyouga/geometry3k:train.")
    if path.is_file() and words:
        raise UserError(f"{source}: a file has no splits; give {name}.")
    if near := sorted(path.rglob("*.json*")):
        raise UserError(f"{source}: a folder; give one of its files, as {near[0]}.")
    try:
        if path.is_file():
            from pyarrow.parquet import ParquetFile

            # HAZARD: what it buffers ahead it keeps, which would be the whole file once more
            tables = ParquetFile(path, pre_buffer=False).iter_batches(100)
        else:
            tables = tables_of(name, words, source).with_format("arrow").iter(100)
        n = 0
        for table in tables:
            for row in table.to_pylist():
                yield f"{source}, row {(n := n + 1)}", row
    except UserError:
        raise
    except ImportError:
        raise UserError(f"{source}: the package datasets reads it; run `pip install datasets`.")
    except Exception as error:  # whatever a file of somebody else's makes of it
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{source}: cannot be read ({said:.300}); replace it, or give another path "
                        "or split.")


def named(source):
    """A source's path or hub id, and the words after it: [SPLIT], [CONFIG, SPLIT] or none."""
    for count in range(3):  # the longest that is there: a colon may be part of a path
        name, *words = str(source).rsplit(":", count)
        if (path := utils.find(name)).exists() and name:
            return str(path), words
    name, *words = str(source).split(":")
    return name, words


def folder_of(source):
    """The folder that a source's image paths begin from."""
    path = Path(named(source)[0])
    return path if path.is_dir() else path.parent


def tables_of(name, words, source):
    """What `datasets` loads of a folder or, into the hub's cache, of a hub id."""
    if not Path(name).exists():
        ask_hub(name, "dataset", "README.md")
    import datasets  # which goes by whether there is a hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said in a sentence
    if not Path(name).exists():  # one rank of a machine downloads, the others wait for it
        return datasets.load_dataset(name, *words[:-1], split=words[-1])
    found = datasets.load_dataset(name, *words[:-1], streaming=True)  # no second copy on the disk
    split = words[-1] if words else [*found][0]
    if split not in found or len(found) > 1 and not words:
        raise UserError(f"{source}: give one of its splits, as {name}:{[*found][0]}; it has "
                        f"{', '.join(found)}.")
    if found[split].info.builder_name not in ("parquet", "arrow"):
        raise UserError(f"{source}: a folder of {found[split].info.builder_name} files, of whose "
                        "texts some would become numbers; give a file of JSON lines, or parquet.")
    return found[split]


@functools.cache
def ask_hub(name, kind, file):
    """Ask once whether the hub has a model or dataset; if it is silent, its cache alone is used.

    UserError where that has no such `file`. The libraries would ask for each file, for minutes.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    problem = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            hub.get_hf_file_metadata(hub.hf_hub_url(name, file, repo_type=kind), timeout=10)
            return
        except errors.RemoteEntryNotFoundError:  # it is there without this file
            return
        except errors.HfHubHTTPError as error:
            problem = f"the hub refuses it ({first_line(error)})"
        except Exception as error:  # whatever a network, a proxy or a name server has to say
            problem = f"the hub cannot be reached ({first_line(error)})"
    what = f"--model {name}" if kind == "model" else name
    if hub.try_to_load_from_cache(name, file, repo_type=kind) is None:
        raise UserError(f"{what}: no such folder, nothing of that name in the hub's cache, and "
                        f"{problem}; give a folder or another name, or run `hf download "
                        f"--repo-type {kind} {name}` where there is a network.")
    constants.HF_HUB_OFFLINE = True  # as that variable would have it
    print0(f"{what}: {problem}; taken from the hub's cache.")


# ---------------------------------------------------------------------------------------------
# Columns under our names


def renamed(row, columns):
    """The row under our names, of `columns` {ours: theirs}; what they replace keeps another one."""
    for ours in ("question", "answer"):
        if ours in columns and columns[ours] not in row:
            raise UserError(f"no {columns[ours]}, which --columns names; it has {', '.join(row)}.")
    used = [name for theirs in columns.values() for name in theirs.split("+")]
    kept = {name: value for name, value in row.items() if name not in used}
    aside = {f"{name}, not in --columns": kept.pop(name) for name in columns if name in kept}
    for ours, theirs in columns.items():
        values = [row[name] for name in theirs.split("+") if row.get(name) is not None]
        if len(values) > 1:  # several pictures, in this order
            values = [[p for value in values for p in (value if type(value) is list else [value])]]
        if values:
            kept[ours] = values[0]
    return kept | aside


def as_columns(text):
    """--columns as {ours: theirs}."""
    pairs = [part.partition("=")[::2] for part in text.split(",") if part.strip()]
    columns = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    known = ("question", "answer", "solution", "id", *PICTURES)
    theirs = [name for names in columns.values() for name in names.split("+")]
    if len(columns) < len(pairs) or len({*theirs}) < len(theirs) or not (
            columns.keys() <= {*known} and all(theirs)):
        raise UserError(f"--columns {text}: give OURS=THEIRS, joined by commas, each once, or "
                        f"images=THEIRS+THEIRS; ours are {', '.join(known)}.")
    return columns
