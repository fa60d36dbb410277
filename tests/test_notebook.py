"""lesson.ipynb: from top to bottom in a copy of the tree, as a reader runs it; and what is committed of it.

    python tests/test_notebook.py        # run it, and write its outputs into lesson.ipynb
"""

import ast
import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_grpo
import utils

NOTEBOOK = ROOT / "lesson.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
STAGES = {path.stem: path for path in ROOT.glob("*.py")}


def text_of(cell):
    return "".join(cell["source"])


CODE = [text_of(cell) for cell in CELLS if cell["cell_type"] == "code"]
TREE = ast.parse("\n".join(CODE))


def copy_of_the_tree(folder):
    """What a clone holds, as it stands here, without what the notebook does not need."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if not name.startswith(("results/", "tests/", ".")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def client(folder):
    """What runs the notebook in a kernel, in `folder`; and the notebook, which gets its outputs."""
    import nbclient
    import nbformat

    notebook = nbformat.read(folder / "lesson.ipynb", 4)
    place = {"metadata": {"path": str(folder)}}
    options = {"timeout": 900, "kernel_name": "python3", "resources": place, "coalesce_streams": True}
    return nbclient.NotebookClient(notebook, **options), notebook


# ---------------------------------------------------------------------------------------------
# What is committed


def test_it_is_short_and_every_code_cell_is_explained():
    assert len(CELLS) <= 30
    for before, cell in zip([None, *CELLS], CELLS):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown", text_of(cell)
        lines = text_of(cell).splitlines()
        assert max(map(len, lines)) <= (100 if cell["cell_type"] == "code" else 130)
        assert len(lines) <= 30


def test_nothing_is_written_twice():
    """No function or class of a stage is written out; what computes is imported, and is there."""
    theirs = {name: {node.name for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, (ast.FunctionDef, ast.ClassDef))} for name, path in STAGES.items()}
    own = {node.name for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not own & set.union(*theirs.values())
    taken = {(node.module, alias.name) for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)
             for alias in node.names if node.module in STAGES}
    assert len(taken) > 15
    assert [pair for pair in taken if pair[1] not in theirs[pair[0]]] == []


def test_it_imports_what_jupyter_and_the_light_requirements_bring():
    found = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    known = {*sys.stdlib_module_names, *STAGES, "IPython", "matplotlib", "torch"}
    assert {name.split(".")[0] for name in found} <= known


def test_the_outputs_are_whole_small_and_of_no_machine():
    """Of one run from top to bottom, without an error, a warning or a path; under 200 kB in all."""
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert {"".join(o["text"]) for o in outputs if o.get("name") == "stderr"} <= {"Sampler: hf.\n"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    whole = NOTEBOOK.read_text()
    assert len(whole.encode()) < 200_000
    said = re.sub(r"[A-Za-z0-9+/=]{200,}", "", whole)  # pictures' bytes may spell anything
    assert not re.search(r"(?<![\w.])/(?:root|home|work|tmp|usr|opt|Users|content|mnt)\b|site-packages|Warning", said)


def test_the_exercises_it_points_at_are_the_lessons():
    lesson = (ROOT / "LESSON.md").read_text()
    for number, name in ((1, "short"), (4, "median")):
        assert re.search(rf"^{number}\. \*\*.+?\*\* \(`{name}`\)", lesson, re.M)
    assert len(re.findall(r"^\d+\. \*\*.+?\*\* \(`\w+`\)", lesson, re.M)) == 2 + 8
    last = text_of(CELLS[-1])
    assert "exercises 1 and 4 of `LESSON.md`" in last and "eight more" in last


def set_up(repository, folder):
    """The first cell in a process of its own, with this as REPOSITORY; where it ends up is printed.

    pip finds nothing to install: what would be is said before.
    """
    code = CODE[0].replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}") + "\nprint(os.getcwd())"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PIP_NO_INDEX": "1"})


def test_opened_alone_it_asks_for_the_repository_clones_it_and_installs_what_is_absent(tmp_path):
    asked = set_up("", tmp_path)
    assert asked.returncode == 1
    assert asked.stderr == ("The scripts are not in this folder: write the repository's address into REPOSITORY, or "
                            "open the notebook from inside a clone.\n")
    alone = copy_of_the_tree(tmp_path / "origin")
    for words in (["init", "--quiet"], ["add", "."],
                  ["-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "m"]):
        subprocess.run(["git", *words], cwd=alone, check=True)
    for _ in range(2):  # the second time, the clone is there
        done = set_up(str(alone), tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path.resolve() / 'glassbox'}\n"  # nothing had to be installed
    pins = "torch==0.1\nnobody-has-this==1.0  # why\ntransformers==4.57.0\ntransformers==99.0\n"
    (tmp_path / "glassbox" / "requirements-light.txt").write_text(pins)
    assert set_up(str(alone), tmp_path).stdout == "Installing nobody-has-this==1.0 transformers==99.0\n"


# ---------------------------------------------------------------------------------------------
# A run of it


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_twice_and_learns(tmp_path):
    """In one kernel, as by two presses of a button; each within the promised minutes."""
    folder = copy_of_the_tree(tmp_path)
    runner, notebook = client(folder)
    once, out = len(notebook.cells), folder / "runs" / "lesson"
    again = copy.deepcopy(notebook.cells)
    for cell in again:
        cell.id += "-again"
    notebook.cells += again
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    runner.execute()  # a cell that fails raises
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - spent < 2 * 300
    result = json.loads((out / "result.json").read_text())["validation_pass1_t0.6"]
    assert result["after"]["accuracy"] - result["before"]["accuracy"] > 0.3  # 0.5 with each of three seeds
    rows = utils.read_jsonl(out / "metrics.jsonl")
    changed = {name: sum(row[name] for row in rows[-8:]) / 8 - sum(row[name] for row in rows[:8]) / 8
               for name in ("reward", "length", "reflection_ratio")}
    assert changed["reward"] > 0.2 and changed["length"] > 0 > changed["reflection_ratio"]  # as it says
    defaults, args = train_grpo.Args, json.loads((out / "args.json").read_text())
    assert (len(rows), args["batch_size"], args["group_size"]) == (32, 16, 8)
    assert (2 * args["batch_size"], args["lr"]) == (defaults.batch_size, 2 * defaults.lr)
    for cells in (notebook.cells[:once], notebook.cells[once:]):
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        said = "".join(output.get("text", "") for output in outputs)
        changes = re.findall(r"advantage ([+-]\d\.\d+)   log-probability +-[\d.]+, ([+-][\d.]+)", said)
        better = [float(change) for advantage, change in changes if float(advantage) > 0]
        assert better and min(better) > 0
        page = next(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
        assert page.count("<section>") == page.count("data:image/png") == 6
        assert len(re.findall("class=(?:good|bad)>", page)) == 6 * 8


@pytest.mark.slow
def test_an_interrupt_stops_the_cell_and_its_run_but_not_the_kernel(tmp_path):
    """What the scripts do about signals, they do in processes of their own alone."""
    from jupyter_client.manager import start_new_kernel

    folder = copy_of_the_tree(tmp_path)
    manager, kernel = start_new_kernel(cwd=str(folder))

    def execute(code):
        return kernel.execute_interactive(code, output_hook=lambda _: None, timeout=200)["content"]

    def interrupted(code, sign):
        """How a cell ends that is interrupted once a file is there."""
        def wait():
            while not sign.exists():
                time.sleep(0.1)
            os.kill(manager.provisioner.pid, signal.SIGINT)  # the kernel alone, as some front ends do

        threading.Thread(target=wait, daemon=True).start()
        return execute(code)["ename"]

    try:
        training = next(code for code in CODE if "def run(" in code)
        for code in CODE[:4]:  # the scripts are imported, and have sampled
            assert execute(code)["status"] == "ok"
        busy = "import time\nPath('begun').touch()\ntime.sleep(150)"
        assert interrupted(busy, folder / "begun") == "KeyboardInterrupt"
        log = folder / "runs" / "lesson" / "metrics.jsonl"
        assert interrupted(training, log) == "KeyboardInterrupt"
        time.sleep(5)  # of a step; then it can say nothing any more
        rows = log.read_text()
        time.sleep(5)  # in which it would have gone on
        assert log.read_text() == rows
        assert not (folder / "runs" / "lesson" / "result.json").exists()
        assert execute("6 * 7")["status"] == "ok"
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)


# ---------------------------------------------------------------------------------------------
# The outputs anew


def main():
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        runner, notebook = client(copy_of_the_tree(Path(folder)))
        runner.execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # clocks
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # a second copy of a picture
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
