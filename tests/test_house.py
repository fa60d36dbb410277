"""The house rules, enforced; what the pages say is held to the tree by test_pages.py."""

import ast
import importlib
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# floors, from the ground up; those of one line stand beside each other
FLOORS = [["utils"], ["pictures", "signs"], ["sources"], ["data"], ["policy"], ["decode"], ["siblings"], ["answers"], ["reward"],
          ["scoring"], ["rollout"], ["doctor"], ["evaluate", "benchmarks"], ["train_sft", "train_grpo"], ["report", "toy"]]
STAGES = [name for floor in FLOORS for name in floor]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
# Lines, blank ones included. Above the plan, since what would have to go is worth more: utils (450: a flag that is nearly
# right is told which one is meant, what makes no sense is refused, a signal is met inside a collective, folders move, runs
# are made longer, a save is tried before step 1, a tracker), data (400: other people's sources and columns, prompts by
# formula, whatever a tokenizer's files say changes nothing, answers as rows again), policy (320: files that are torn, weights
# that do not fit, bounds on pixels, models of text alone; LoRA by hand, weights that are merged and gathered one by one),
# rollout (480: every hang and every wrong answer of vLLM is a sentence), doctor (230: the rehearsal, which every stage calls,
# and the guard of each step), train_grpo (600: flags for data and memory; metrics of how far the sampler is), report (650: a
# page on folders that may be broken). Rooms that the plan has not: pictures and sources (out of data), signs (out of report),
# answers and scoring (out of reward: the mathematics of an answer, the words around it, and what a sample earns are three
# lessons, and one room of 520 lines held neither the kinds of answers that people write nor a reader), decode (out of
# siblings), benchmarks.
BUDGETS = {"utils": 715, "pictures": 281, "signs": 280, "sources": 210, "data": 505, "policy": 490,
           "decode": 190, "siblings": 360, "answers": 552, "reward": 520, "scoring": 125, "rollout": 546, "doctor": 275,
           "train_sft": 275, "train_grpo": 674, "evaluate": 307, "benchmarks": 360, "report": 675, "toy": 401}
PURE = ["utils", "signs", "answers", "evaluate", "train_grpo"]  # their functions work where they and utils.py lie alone


def source(stage):
    return (ROOT / f"{stage}.py").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_budgets(stage):
    """Lines with comments, 100 columns, main at most 150 lines, any other function 60."""
    lines = source(stage).splitlines()
    assert len(lines) <= BUDGETS[stage], f"{stage}.py has {len(lines)} lines"
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
    for node in ast.walk(ast.parse(source(stage))):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (150 if node.name == "main" else 60), f"{node.name} has {length} lines"


@pytest.mark.parametrize("stage", STAGES)
def test_one_statement_a_line_and_nothing_swallowed(stage):
    """No two statements on a line, no bare except, no `pass` in an except."""
    statements = [n for n in ast.walk(ast.parse(source(stage))) if isinstance(n, ast.stmt)]
    begins = [n.lineno for n in statements]
    assert len(begins) == len(set(begins))
    for node in ast.walk(ast.parse(source(stage))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not isinstance(node.body[0], ast.Pass), node.lineno


@pytest.mark.parametrize("stage", [s for s in STAGES if "class Args" in source(s)])
def test_every_flag_is_documented_and_read(stage):
    """A flag that nobody reads is a lie; so is one without a line of help."""
    text = source(stage)
    module = importlib.import_module(stage)
    docs = re.findall(r"^    (\w+):.*?  # (.+)$", text.split("class Args")[1].split("\n\n\n")[0], re.M)
    names = list(module.Args.__dataclass_fields__)
    assert [name for name, _ in docs] == names
    everywhere = "".join(source(s) for s in STAGES)
    for name in names:
        assert re.search(rf"\bargs\.{name}\b", everywhere), f"args.{name} is never read"


def imports(tree):
    """`(module, line)` of every import of a syntax tree."""
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            yield name.split(".")[0], node.lineno


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_imports_what_stands_above_it(stage):
    """Not even inside a function, `main` excepted, which is where a stage is wired: so there is no circle."""
    tree = ast.parse(source(stage))
    tree.body = [n for n in tree.body if not (isinstance(n, ast.FunctionDef) and n.name == "main")]
    for name, line in imports(tree):
        if name in FLOOR:
            assert FLOOR[name] < FLOOR[stage], f"{stage}.py, line {line} imports {name}, which stands above it"


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_imported_at_import_time(stage):
    """Ours from below, utils alone where a file's functions are to be copied alone; vllm, matplotlib and trackers
    are imported where they are used, and siblings where sharing is on."""
    ours = {"utils"} if stage in PURE else set(STAGES) - {"siblings"}
    third = {"torch", "numpy", "PIL", "transformers", "tqdm", "tokenizers"} | ours
    for node in ast.parse(source(stage)).body:
        for name, line in imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            assert name in third | sys.stdlib_module_names, f"{stage}.py, line {line} imports {name}"


def test_utils_knows_no_model_and_no_algorithm():
    """The ground floor is boring: its words are flags, ranks, files."""
    found = re.findall(r"(?i)\b(?:models?|images?|pictures?|rewards?|prompt_ids|advantages?|tokenizer)\b", source("utils"))
    assert {*found} <= {"model", "rewards"}, found  # of a state dict, and of the flags --model and --rewards


@pytest.mark.parametrize("stage, low, high", [
    ("train_grpo", 0.25, 0.40), ("train_sft", 0.10, 0.40),  # each flag's help is a comment
    *((s, 0.10, 0.25) for s in STAGES if not s.startswith("train"))])
def test_share_of_comment_lines(stage, low, high):
    """Lines that bear a comment, over lines that bear code."""
    path = ROOT / f"{stage}.py"
    with open(path, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENCODING, tokenize.ENDMARKER}
    code = {t.start[0] for t in tokens if t.type not in skip}
    share = len(commented) / len(code)
    assert low <= share <= high, f"{stage}.py: {share:.0%} comment lines"
