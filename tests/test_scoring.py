"""scoring.py: which rewards a run has (names, files of the user's own, weights), and what each sample earns.

    pytest tests/test_scoring.py
"""
import json
import math
import re
import sys
import tempfile
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import scoring  # noqa: E402
import utils  # noqa: E402


@pytest.fixture(autouse=True)
def no_reward_file_stays(monkeypatch):
    """In one process Python keeps one module of a name; a run loads its reward files once, we do in many tests."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(scoring, "FOLDERS", set())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(tempfile.gettempdir()):
            del sys.modules[name]


def sample(text, answer="5", tokens=10, finish="stop", name="q1"):
    return SimpleNamespace(id=name, question="?", answer=answer, completion_text=text,
                           completion_ids=list(range(tokens)), finish_reason=finish)


def test_lone_surrogates_are_scored():
    """What a byte-level tokenizer, or JSON with half an escape, brings in."""
    for text in ("\ud800", "so \udc80 it is \\boxed{5\ud800}", "\udfff \\boxed{5}", "the answer is \ud800", "\ud83d" * 9_000):
        for wanted in ("5", "B", "\ud800", "\\boxed{\ud800}", "a\udcff"):
            samples = [sample(text, answer=wanted)]
            scoring.score(samples, scoring.load_rewards("accuracy:1,language:1,format:1"))
            assert math.isfinite(samples[0].reward)


def test_score_weighs_and_sums():
    samples = [sample(r"\boxed{5}"), sample(r"漢 \boxed{6} b"), sample(r"\boxed{5}", answer=""),
               sample(r"\boxed{5}", finish="length")]
    scoring.score(samples, scoring.load_rewards("accuracy:2.0,language:1.0,unfinished:1.0"))
    assert samples[0].rewards == {"accuracy": 1.0, "language": 0.0, "unfinished": 0.0}
    assert samples[0].reward == 2.0
    # letters: 1 Chinese, b and the five of \boxed
    assert samples[1].reward == pytest.approx(-0.1 / 7)
    # no reference: accuracy cannot be scored, the others still count
    assert samples[2].rewards["accuracy"] is None and samples[2].reward == 0.0
    # the paper's rule: an unfinished response gets -0.1 in all, although its answer is right
    assert samples[3].rewards["accuracy"] == 1.0 and samples[3].reward == -0.1
    only = [sample("a", answer="")]
    scoring.score(only, scoring.load_rewards("accuracy:1.0"))
    assert only[0].reward is None
    scoring.score([], scoring.load_rewards("accuracy:1.0"))


def test_overlong_follows_max_new_tokens():
    (function, weight), = scoring.load_rewards("overlong:0.5", max_new_tokens=100).values()
    assert weight == 0.5 and function([sample("", tokens=100), sample("", tokens=75)]) == [-1.0, 0.0]


def test_a_users_own_reward(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("SCALE = 10\n\ndef brevity(samples):\n"
                    "    return [None if not s.completion_ids else SCALE / len(s.completion_ids) for s in samples]\n")
    rewards = scoring.load_rewards(f"accuracy:1.0,{mine}:brevity:0.5")
    samples = [sample(r"\boxed{5}", tokens=20), sample("6", tokens=0)]
    scoring.score(samples, rewards)
    assert [s.reward for s in samples] == [1.25, 0.0] and samples[1].rewards["brevity"] is None


def test_the_reward_model_of_the_lesson(tmp_path, monkeypatch):
    """A sequence classifier as the reward: LESSON.md's own file, with a tiny model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    processor = transformers.AutoTokenizer.from_pretrained(ROOT / "toy_model")
    config = transformers.LlamaConfig(
        vocab_size=len(processor), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "judge")
    code, = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / "LESSON.md").read_text(), re.S)
             if "SequenceClassification" in block)
    (tmp_path / "judge.py").write_text(code)
    monkeypatch.setenv("JUDGE", str(tmp_path / "judge"))
    samples = [sample("three", tokens=3), sample("so seven", tokens=7), sample("", tokens=0)]
    scoring.score(samples, scoring.load_rewards(f"{tmp_path / 'judge.py'}:judge:2.0"))
    texts = [f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{s.completion_text}<|im_end|>\n"
             for s in samples[:2]]
    with torch.no_grad():
        wanted = [model(**processor(text, return_tensors="pt")).logits.item() for text in texts]
    assert [s.reward for s in samples[:2]] == pytest.approx([2 * x for x in wanted])
    assert wanted[0] != wanted[1] and samples[2].reward is None


@pytest.mark.parametrize("spec, sentence", [
    ("acuracy:1.0", "no reward 'acuracy'"), ("accuracy", "no weight"), ("accuracy:much", "no weight"),
    ("accuracy:nan", "no weight"), ("", "no weight"), ("accuracy:1.0,", "no weight"), ("accuracy:", "no weight"),
    ("accuracy:1,accuracy:2", "twice"), ("nowhere.py:f:1.0", "'nowhere.py' does not exist"),
    (f"{__file__}:nothing_here:1.0", "no reward 'nothing_here'"),
])
def test_a_wrong_spec_is_one_sentence(spec, sentence):
    with pytest.raises(utils.UserError) as error:
        scoring.load_rewards(spec)
    assert sentence in str(error.value) and "\n" not in str(error.value)


HELPED = """import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from helper import g


def work(text):
    from later import h
    return g() + h()


def plain(samples):
    return [work(s) for s in samples]


def pooled(samples):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(work, samples))


def spawned(samples):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(work, samples)
"""


def helped(folder, name, suffix=""):
    """A reward file, its helper, and a package that it imports late."""
    (folder / f"later{suffix}").mkdir(parents=True)
    for file, text in ((name, HELPED.replace("helper", f"helper{suffix}").replace("later", f"later{suffix}")),
                       (f"helper{suffix}.py", "def g():\n    return 1\n"), (f"later{suffix}/__init__.py", "from .deep import h\n"),
                       (f"later{suffix}/deep.py", "def h():\n    return 10\n")):
        (folder / file).write_text(text)
    return folder / name


def test_helpers_beside_a_reward_file_and_workers_of_its_pools(tmp_path, monkeypatch):
    """Wherever the process is when it calls it; forked workers and spawned ones."""
    helped(tmp_path / "a", "mine.py")
    helped(tmp_path / "b", "yours.py", suffix="_b")
    monkeypatch.chdir(tmp_path)
    rewards = scoring.load_rewards("a/mine.py:plain:1,a/mine.py:pooled:1,b/yours.py:spawned:1")
    monkeypatch.chdir("/")
    for _ in range(2):
        samples = [sample("x"), sample("y")]
        scoring.score(samples, rewards)
        assert [s.rewards for s in samples] == [{"plain": 11.0, "pooled": 11.0, "spawned": 11.0}] * 2


@pytest.mark.parametrize("name, why", [
    ("utils.py", "loaded"), ("report.py", "ours, not loaded yet"), ("json.py", "Python's"), ("time.py", "Python's, built in"),
    ("torch.py", "installed"), ("tests.py", ""), ("sub/__init__.py", "of the other file"), ("mine.py", "the other file"),
    ("helper.py", "of the other file"), ("utils.txt", ""), ("utils/x.py", "")])
def test_a_helper_with_the_name_of_another_module_is_refused(tmp_path, name, why):
    """One would stand in for the other: in the reward file, or in ours."""
    first = helped(tmp_path / "a", "mine.py")
    (tmp_path / "a" / "sub.py").write_text("")
    scoring.load_rewards(f"{first}:plain:1")
    second = tmp_path / "b" / "yours.py"
    (second.parent / name).parent.mkdir(parents=True)
    (second.parent / name).write_text("")
    second.write_text("def f(samples):\n    return [1]\n")
    if why:
        with pytest.raises(utils.UserError, match=f"{name} has the name of another module: rename it, or give the reward file"):
            scoring.load_rewards(f"{second}:f:1")
    else:
        scoring.load_rewards(f"{second}:f:1")
    assert sys.modules["utils"] is utils and sys.modules["json"] is json


def test_a_file_with_two_rewards_is_run_once(tmp_path):
    log = str(tmp_path / "log")
    (tmp_path / "mine.py").write_text(f"open({log!r}, 'a').write('x')\n\ndef f(samples):\n    return [1]\n\ng = f\n")
    scoring.load_rewards(f"{tmp_path}/mine.py:f:1,{tmp_path}/mine.py:g:1")
    assert Path(log).read_text() == "x"


def test_a_reward_file_is_a_py_file(tmp_path):
    """With a hyphen or a digit in its name, but not with another ending: workers of its pools import it by its name."""
    for name in ("my-judge.py", "1.py"):
        (tmp_path / name).write_text("import pickle\n\n\ndef f(samples):\n    pickle.dumps(f)\n    return [7] * len(samples)\n")
        samples = [sample("x")]
        scoring.score(samples, scoring.load_rewards(f"{tmp_path / name}:f:1"))
        assert samples[0].reward == 7.0
    (tmp_path / "judge").write_text("def f(samples):\n    return []\n")
    with pytest.raises(utils.UserError, match="is no file that ends in .py"):
        scoring.load_rewards(f"{tmp_path / 'judge'}:f:1")


@pytest.mark.parametrize("text, line, sentence", [
    ("x = 1\n\ndef f(samples:\n    return 1\n", 3, r"SyntaxError: '\(' was never closed"),
    ("def f(samples):\nreturn 1\n", 2, "IndentationError: expected an indented block"),
    ("import os\nimport nothing_of_this_name\n", 2, "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("\nfrom broken import g\n", "broken.py, line 1", r"SyntaxError: '\(' was never closed"),
    ("import os\n\nfrom wrong import g\n", "wrong.py, line 2", "KeyError: 1"),
    ("import sys\n\n\nsys.exit(3)\n", 4, "SystemExit: 3"),
    ("class Stop(Exception):\n    pass\n\nraise Stop('so\\nit \\ud800 is')\n", 4, "Stop: so it \ud800 is"),
    ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError"),
    (b"# one\nx = 'caf\xe9'\n", 2, r"SyntaxError: \(unicode error\) 'utf-8' codec"),
])
def test_a_reward_file_that_cannot_be_loaded_is_one_sentence(tmp_path, text, line, sentence):
    (tmp_path / "broken.py").write_text("x = (\n")
    (tmp_path / "wrong.py").write_text("\n{}[1]\n")
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    place = tmp_path / line if isinstance(line, str) else f"{path}, line {line}"
    with pytest.raises(utils.UserError) as error:
        scoring.load_rewards(f"accuracy:1.0,{path}:f:1.0")
    said = str(error.value)
    assert f"reward file '{path}' cannot be loaded ({place}): " in said and "\n" not in said
    assert re.search(sentence, said)


def test_no_file_and_no_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "three.py").write_text("f = 3\n")
    (tmp_path / "zero.py").write_bytes(b"f = 3\0\n")
    for path, sentence in (("folder.py", "'folder.py' does not exist, or is no file"), ("three.py", "three.py has no reward 'f'"),
                           ("zero.py", "null bytes"), ("\ud800.py", "does not exist"), ("a\0b.py", "does not exist")):
        with pytest.raises(utils.UserError, match=sentence):
            scoring.load_rewards(f"{path}:f:1")


def test_an_interrupt_is_no_failed_reward(tmp_path):
    (tmp_path / "mine.py").write_text("def f(samples):\n    raise KeyboardInterrupt\n")
    (tmp_path / "now.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        scoring.score([sample("a")], scoring.load_rewards(f"{tmp_path}/mine.py:f:1"))
    with pytest.raises(KeyboardInterrupt):
        scoring.load_rewards(f"{tmp_path}/now.py:f:1")


RAISES = """import json
import sys
from functools import partial, wraps

from helper import boom


class Stop(Exception):
    def __str__(self):
        raise ValueError


def decorated(function):
    @wraps(function)
    def inner(samples):
        return function(samples)
    return inner


@decorated
def f(samples):
    ACT
    return [0.0]


def g(samples, again):
    return f(samples)


h = partial(g, again=True)
"""


@pytest.mark.parametrize("name", "fh")
@pytest.mark.parametrize("act, sentence", [
    ("sys.exit(3)", "SystemExit: 3."), ("raise Stop", "mine.Stop: <exception str() failed>."),
    ("boom()", "KeyError: 'x'."), ("raise StopIteration", "StopIteration."),
    ("raise ValueError('a \\ud800\\n b')", "ValueError: a \ud800 b."), ("json.loads('{')", "json.decoder.JSONDecodeError: "),
    ("from nowhere_at_all import x", "ModuleNotFoundError: "), ("f(samples)", "RecursionError: ")])
def test_a_reward_that_raises_is_one_sentence(tmp_path, name, act, sentence):
    """With the last line of the user's own, under its decorators: of its file or of one beside it."""
    (tmp_path / "helper.py").write_text("def boom():\n    {}['x']\n")
    path = tmp_path / "mine.py"
    path.write_text(RAISES.replace("ACT", act))
    with pytest.raises(utils.RunError) as error:
        scoring.score([sample("a")], scoring.load_rewards(f"{path}:{name}:1"))
    said = str(error.value)
    file, line = ("helper.py", 2) if act == "boom()" else ("mine.py", "(22|16)" if act == "f(samples)" else 22)
    assert re.match(rf"reward '{name}' failed \({tmp_path / file}, line {line}\): {re.escape(sentence)}", said) and "\n" not in said


def test_numbers_that_a_reward_may_return():
    """All become floats, which JSON can write: a run's samples are kept with them."""
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for value in (0.5, Fraction(1, 2), Decimal("0.5"), np.float16(0.5), np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        samples = [sample("a"), sample("b"), sample("c")]
        scoring.score(samples, {"mine": (lambda samples: [value, None, 2], 2.0)})
        assert [s.reward for s in samples] == [1.0, None, 4.0] and type(samples[0].rewards["mine"]) is float
    for value in (True, 1, np.int64(1), np.bool_(True), np.uint8(1), 10**15):
        samples = [sample("a")]
        scoring.score(samples, {"mine": (lambda samples: [value], 1.0)})
        assert json.dumps(samples[0].rewards) == json.dumps({"mine": float(value)})


HUGE = 10**400
WRONG = [HUGE, -HUGE, 10**5000, Fraction(HUGE), Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal("1e400"), 1e300, 1j, b"1",
         "\ud800", [1.0], object()]


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [1.0, math.inf], [1.0, "2"], None, (1.0, 2.0),
                                    *([1.0, x] for x in WRONG), iter([1.0, 2.0])], ids=lambda x: "")
def test_a_wrong_reward_is_one_sentence(values):
    sentence = "must return a list of 2 finite numbers|failed: ValueError: Exceeds the limit .4300 digits"
    with pytest.raises(utils.RunError, match=f"reward 'mine' ({sentence})"):
        scoring.score([sample("a"), sample("b")], {"mine": (lambda samples: values, 1.0)})


def test_a_reward_too_large_with_its_weight():
    """float32 would make it infinite, and the step's advantages nan."""
    with pytest.raises(utils.RunError, match="weighed too, at most 1e.15"):
        scoring.score([sample("a")], {"mine": (lambda samples: [1e10], 1e10)})
