"""PPO with a critic, the patch beside the exercises: it applies, is short, computes what it says, goes on, and learns.

What it computes is checked in a copy of the tree, by tests/exercises/ppo_checks.py.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from statistics import mean

import pytest
from safetensors import safe_open

import report
import utils
from runs import TINY, all_finite, elsewhere, fork, splits, timeless
from test_exercises import FOLDER, apply, changed_lines, copy_tree
from test_pages import LESSON, RESULTS, ROOT, section, words


def patched(folder):
    copy_tree(folder)
    shutil.copy(FOLDER / "ppo_checks.py", folder / "tests" / "exercises")
    apply("ppo", folder)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return patched(tmp_path_factory.mktemp("ppo"))


def test_it_is_short_and_in_the_style_of_the_house(tree):
    """At most 80 lines change, in two files; main, which is at its bound, gets four more lines, others stay within 60."""
    assert 40 < sum(changed_lines("ppo")) <= 80
    files = re.findall(r"^\+\+\+ b/(.*)$", (FOLDER / "ppo.patch").read_text(), re.M)
    assert files == ["policy.py", "train_grpo.py"]
    for name in files:
        text = (tree / name).read_text()
        assert [line for line in text.splitlines() if len(line) > 100] == []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= (154 if node.name == "main" else 60), f"{node.name} has {length} lines"


def check(folder, *more):
    words = ["pytest", "-q", "-p", "no:cacheprovider", "tests/exercises/ppo_checks.py", *more]
    (code,), out, err = fork(*words, act=elsewhere, folder=folder)
    return code, out + err


def test_what_it_computes(tree):
    count = len(re.findall(r"^def test_", (FOLDER / "ppo_checks.py").read_text(), re.M))
    code, said = check(tree)
    passed = re.search(r"(\d+) passed", said)
    assert code == 0 and passed and int(passed[1]) >= count, said[-3000:]


SLIPS = {  # what is changed in the patched tree, and the check that must see it
    "values of padding leak": ("train_grpo.py", "(torch.where(mask, x, 0.0) for x in (rewards, values))",
                               "(x.nan_to_num(9.0) for x in (rewards, values))", "gae_by_hand"),
    "lambda is forgotten": ("train_grpo.py", "+= gamma * lam *", "+= gamma *", "gae_is_the_sum"),
    "the reward comes first": ("train_grpo.py", "(left == 1)", "(left == left[:, :1])", "last_token"),
    "whitened on a rank alone": ("train_grpo.py", "utils.gather([found[0].where(mask, math.nan)])",
                                 "2 * [found[0].where(mask, math.nan)]", "over_all_ranks"),
    "a value of the state after": ("policy.py", "(hidden @ self.critic)", "(hidden.roll(-1, 0) @ self.critic)",
                                   "state_before"),
    "errors weigh twice": ("train_grpo.py", "values - returns, 0.0).square() / 2", "values - returns, 0.0).square()",
                           "value_loss"),
    "no gradient into the trunk": ("policy.py", "(hidden @ self.critic)", "(hidden.detach() @ self.critic)",
                                   "reaches_the_trunk"),
    "not the sum over all tokens": ("train_grpo.py", "+ args.value_coef * errors", "+ args.value_coef * errors / mask.sum()",
                                    "no_way_of_computing"),
}


@pytest.mark.parametrize("slip", [pytest.param(s, marks=pytest.mark.slow if i % 4 else ()) for i, s in enumerate(SLIPS)])
def test_a_slip_is_seen(slip, tmp_path):
    file, right, wrong, name = SLIPS[slip]
    text = (patched(tmp_path) / file).read_text()
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong))
    code, said = check(tmp_path, "-k", name)
    assert code == 1 and "failed" in said, said[-3000:]


# ---------------------------------------------------------------------------------------------
# Runs


def train(tree, *words, ranks=1):
    """A run of the patched trainer to its end; its stderr."""
    codes, _, err = fork("train_grpo.py", "--advantage", "gae", *words, act=elsewhere, ranks=ranks, folder=tree)
    assert codes == [0] * ranks, err[-3000:]
    return err


@pytest.fixture(scope="module")
def straight(tree, data, tmp_path_factory):
    """Four steps of two updates, without evaluations, one answer a prompt; the words, and the run folder."""
    out = tmp_path_factory.mktemp("straight") / "run"
    words = [*TINY, "--group_size", "1", "--mini_batch_size", "2", "--value_lr", "0.01", *splits(data)[:2],
             "--validation_data=", "--test_data="]
    train(tree, *words, "--max_steps", "4", "--out", out)
    return words, out


def test_a_run_that_goes_on_keeps_its_critic(tree, straight, tmp_path):
    """Two steps and two more are four steps, to the last bit: the head and its optimiser state are resumed."""
    words, whole = straight
    train(tree, *words, "--max_steps", "2", "--out", tmp_path / "run")
    assert "Continuing after step 2." in train(tree, *words, "--max_steps", "4", "--out", tmp_path / "run")
    rows = timeless(whole / "metrics.jsonl")
    assert rows == timeless(tmp_path / "run" / "metrics.jsonl") and len(rows) == 4 and all_finite(rows)
    assert len({row["value_loss"] for row in rows}) == 4 and rows[-1]["explained_variance"] is not None


def test_what_is_exported_is_the_policy_alone(straight):
    """The tensors of the base's file and no other: a checkpoint loads as any does, without the critic."""
    newest = utils.latest_checkpoint(straight[1])
    names = [set(safe_open(folder / "model.safetensors", "pt").keys()) for folder in (newest, ROOT / "toy_model")]
    assert names[0] == names[1]


def test_two_ranks_do_what_one_does(tree, straight, tmp_path):
    """Sharded by FSDP2; and they go on: a critic's shards come back. Later steps differ by rounding."""
    words, alone = straight
    for steps in (1, 2):
        train(tree, *words, "--max_steps", steps, "--out", tmp_path / "run", ranks=2)
    one, two = (timeless(folder / "metrics.jsonl") for folder in (alone, tmp_path / "run"))
    assert len(two) == 2 and all_finite(two)
    for name in ("reward", "loss", "value_loss", "explained_variance", "grad_norm"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-5), name
        assert two[1][name] == pytest.approx(one[1][name], rel=2e-2, abs=1e-3), name


@pytest.mark.slow
def test_it_learns(tree, tmp_path):
    """The quick start's length, with a seed that no figure was taken from."""
    words = ["train_grpo.py", "--advantage", "gae", "--seed", "100", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for split, least in (("validation", 0.3), ("test", 0.2)):
        entry = json.loads(done.stdout.splitlines()[-1])[f"{split}_pass1_t0.6"]
        assert entry["after"]["accuracy"] - entry["before"]["accuracy"] > least, split
    rows = utils.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    explained = [row["explained_variance"] for row in rows[8:32]]
    assert sum(explained) / len(explained) > 0.05  # the critic knows something of what an answer will earn


# ---------------------------------------------------------------------------------------------
# Beside GRPO: what the pages say is what results/quickstart and results/ppo hold


def kept(arm, seed, name):
    path = ROOT / "results" / arm / f"seed_{seed}" / name
    return utils.read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text())


def ends(arm, split, when="after"):
    """Accuracy of seeds 0 to 2, in %."""
    return [100 * kept(arm, seed, "result.json")[f"{split}_pass1_t0.6"][when]["accuracy"] for seed in (0, 1, 2)]


def ends_table():
    rows = [["seed", *(f"{split}, {what}" for split in ("validation", "test") for what in ("untrained", "GRPO", "PPO"))]]
    columns = [ends(*place) for split in ("validation", "test") for place in (
        ("quickstart", split, "before"), ("quickstart", split), ("ppo", split))]
    return rows + [[seed, *(f"{column[seed]:.1f}" for column in columns)] for seed in (0, 1, 2)]


def course_table():
    """Means of 8 steps and three seeds, on training prompts."""
    rows = [["", *(f"steps {k + 1}-{k + 8}" for k in range(0, 48, 8))]]
    for label, arm, name in (("GRPO, accuracy in %", "quickstart", "reward/accuracy"),
                             ("PPO, accuracy in %", "ppo", "reward/accuracy"),
                             ("PPO, explained variance", "ppo", "explained_variance")):
        runs = [kept(arm, seed, "metrics.jsonl") for seed in (0, 1, 2)]
        assert [len(run) for run in runs] == [48] * 3
        means = [mean(row[name] for run in runs for row in run[k : k + 8]) for k in range(0, 48, 8)]
        rows.append([label, *(f"{x:.2f}" if name == "explained_variance" else f"{100 * x:.0f}" for x in means)])
    return rows


def verdict(split):
    grpo, ppo = ends("quickstart", split), ends("ppo", split)
    return "better" if min(ppo) > max(grpo) else "worse" if max(ppo) < min(grpo) else "undecided"


def test_the_comparison_is_what_the_pages_say():
    """The tables, the verdicts by the rule, the rate that was chosen; both arms differ in nothing else."""
    assert report.markdown_table(ends_table()) in LESSON and report.markdown_table(course_table()) in RESULTS
    text = words(section("PPO with a critic", RESULTS))
    means = [f"{mean(ends(arm, split)):.1f}" for split in ("validation", "test") for arm in ("ppo", "quickstart")]
    assert f"PPO is {verdict('validation')} on validation ({means[0]} against {means[1]}, means of seeds)" in text
    assert f"{verdict('test')} on test ({means[2]} against {means[3]})" in text
    found = json.loads((ROOT / "results" / "ppo" / "ppo.json").read_text())
    sweep = found["validation before and after, by learning rate and tuning seed"]
    reached = {float(lr): mean(after for _, after in seeds) for lr, seeds in sweep.items()}
    assert found["chosen"] == max(sorted(reached), key=reached.get)
    said = ", ".join(f"{reached[lr]:.1f} at {lr:.0e}".replace("e-0", "e-") for lr in sorted(reached))
    assert f"(mean of both seeds: {said})" in text
    for seed in (0, 1, 2):
        args, grpo = kept("ppo", seed, "args.json"), kept("quickstart", seed, "args.json")
        own = {"advantage": "gae", "lr": found["chosen"], "gamma": 1.0, "gae_lambda": 1.0, "value_coef": 0.1,
               "value_lr": 0.003}
        assert own.items() <= args.items() and args["seed"] == seed
        assert {name for name in args if args[name] != grpo.get(name)} == own.keys() | {"out"}
        before = [ends(arm, "validation", "before")[seed] for arm in ("ppo", "quickstart")]
        assert before[0] == pytest.approx(before[1], abs=1)


def test_the_trials_are_what_the_page_says():
    """15 on seed 10: what each ended at on validation, in the order of the page."""
    trials, text = (json.loads((ROOT / "results" / "ppo" / "trials.json").read_text()),
                    words(section("PPO with a critic", RESULTS)))
    as_they_are = [t for t in trials if not t["rewards normalised"]]
    assert len(trials) == 15 and len(as_they_are) == 6
    explained = max(max(t["explained variance, steps 1-8, 9-16, 17-24"]) for t in as_they_are)
    assert explained <= 0.01 and "the critic explained nothing in six" in text
    after = [t["validation after, %"] for t in as_they_are]
    assert f"validation ended at {min(after)} to {max(after)}." in text

    alike = [t for t in as_they_are if (t["lr"], t["gae_lambda"]) == (5e-5, 1)]
    slow, fast = ([t["training accuracy, steps 17-24, %"] for t in alike if t["gradient into the trunk"] == flows]
                  for flows in (False, True))
    assert "training prompts: {} and {} %, with it {} and {})".format(*slow, *fast) in text and max(slow) < min(fast)

    def of(**wanted):
        found, = [t for t in trials if t["rewards normalised"] and wanted.items() <= t.items()]
        return found["validation after, %"]

    half = {"value_coef": 0.5, "lr": 5e-5, "gae_lambda": 1.0}
    heads = [of(value_lr=lr, **half) for lr in (3e-3, 1e-3, 1e-2)]
    assert "ended at {} with the head at 3e-3, {} at 1e-3, {} at 1e-2".format(*heads) in text
    assert f"and {of(**half | {'gae_lambda': 0.95})} with lambda 0.95" in text
    twice = half | {"lr": 1e-4}
    assert f"at rate 1e-4 at {of(**twice)}, with lambda 0.95 at {of(**twice | {'gae_lambda': 0.95})}" in text
    tenth = [of(value_coef=0.1, lr=lr) for lr in (5e-5, 1e-4, 2e-4)]
    assert "at 0.1, at {}, {} and {} with the three rates".format(*tenth) in text


def test_the_lesson_says_how_long_the_patch_is(tree):
    text = words(section("Exercises", LESSON))
    assert f"changes {sum(changed_lines('ppo'))} lines of [policy.py](policy.py) and [train_grpo.py](train_grpo.py)" in text
    node = next(n for n in ast.parse((tree / "train_grpo.py").read_text()).body if getattr(n, "name", "") == "main")
    assert f"`main` then has {node.end_lineno - node.lineno + 1} lines" in text
