"""How much code runs a GRPO step, counted alike: `python results/count_peers.py NAME=GIT_DIRECTORY ...` prints JSON.

Reads HEAD. Sizes are [files, lines, code lines: without blanks, comments, docstrings]. `closure` is what the one file
that trains imports inside its repository, and what that imports (in functions and under TYPE_CHECKING too); an
__init__ is followed only to the names that are asked of it. `repository` leaves out tests and results.
"""

import ast
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize

ENTRIES = "trl/trainer/grpo_trainer.py verl/trainer/main.py recipes/full_ppo_vllm_distributed.py train_grpo.py"
IDLE = {getattr(tokenize, n) for n in "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER ENCODING".split()}

def nodes(path, *kinds):
    return [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, kinds)]

def size(paths):
    code = 0
    for p in paths:
        tokens = [t for t in tokenize.tokenize(io.BytesIO(p.read_bytes()).readline) if t.type not in IDLE]
        docs = [n for n in nodes(p, ast.Expr) if isinstance(n.value, ast.Constant)]
        code += len({i for t in tokens for i in range(t.start[0], t.end[0] + 1)}
                    - {i for n in docs for i in range(n.lineno, n.end_lineno + 1)})
    return [len(paths), sum(len(p.read_bytes().splitlines()) for p in paths), code]

def imported(root, path):  # (package as parts of a path, name, what it is called here) for every from-import
    above = path.parent.relative_to(root).parts
    return [((above[: len(above) + 1 - n.level] if n.level else ()) + tuple(re.findall(r"\w+", n.module or "")),
             a.name, a.asname or a.name) for n in nodes(path, ast.ImportFrom) for a in n.names]

def follow(root, parts, name, known, path):  # to the files that `from parts import name as known` leads to
    place, init = root.joinpath(*parts), root.joinpath(*parts, "__init__.py")
    if files := [f for f in (place.with_name(place.name + ".py"), place / f"{name}.py") if f.is_file()]:
        return {files[0]}
    if (place / name / "__init__.py").is_file():  # a package: follow each `known.attribute` of path
        names = {n.attr for n in nodes(path, ast.Attribute) if getattr(n.value, "id", 0) == known}
        return set().union(*(follow(root, (*parts, name), n, n, init) for n in names))
    for there in imported(root, init) if init.is_file() else ():
        if there[2] == name:
            return follow(root, *there, init)
    return {init} if init.is_file() and name else set()  # defined there: it counts, its own imports do not

def imports(root, path):
    found = imported(root, path) + [(a.name.split("."), "", "") for n in nodes(path, ast.Import) for a in n.names]
    for config in path.parent.rglob(path.stem + ".yaml"):  # hydra's `_target_: package.name`
        found += [(t.split("."), n, "") for t, n in re.findall(r"_target_: ([\w.]+)\.(\w+)", config.read_text())]
    return set().union(*(follow(root, *f, path) for f in found))

def count(directory, root):
    def git(*args):
        return subprocess.check_output(["git", "--git-dir", directory, *args])

    tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))).extractall(root, filter="data")
    def name(path):
        return path.relative_to(root).as_posix()

    every = sorted(root.rglob("*.py"))
    rest = [p for p in every if not re.search(r"(^|/)(tests?|results)/|(^|/)(test_|conftest)", name(p))]
    closure, todo = set(), {next(root / e for e in ENTRIES.split() if (root / e).is_file())}
    while todo:
        closure |= todo
        todo = {f for p in todo if p.name != "__init__.py" for f in imports(root, p)} - closure
    defs = [(n, p) for p in every for n in nodes(p, ast.FunctionDef, ast.AsyncFunctionDef)]
    long = max((n.end_lineno - n.lineno + 1, n.name, f"{name(p)}:{n.lineno}") for n, p in defs if p in closure)
    return {"head": git("log", "-1", "--format=%H %cI").decode().strip(), "repository": size(rest),
            "closure": size(closure), "longest": long, "tests": sum(n.name.startswith("test_") for n, _ in defs)}

with tempfile.TemporaryDirectory() as folder:
    pairs = [argument.split("=", 1) for argument in sys.argv[1:]]
    print(json.dumps({name: count(directory, pathlib.Path(folder, name)) for name, directory in pairs}, indent=1))
