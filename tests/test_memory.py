"""What tests/simulate.py says of memory and work, against what can be measured here, and against the pages."""

import json
import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

import bench
import simulate
import train_grpo
from policy import load_processor
from runs import fork, ROOT
from test_pages import raw, README, RESULTS

CASES = {  # flags of train_grpo.py, dtype of compute
    "plain": ({"plain": True}, "float32"),
    "shared": ({}, "float32"),
    "sharded": ({}, "bfloat16"),
    "sharded and recomputed": ({"gradient_checkpointing": True}, "bfloat16"),
    "low rank": ({"lora_rank": 4, "gradient_checkpointing": True}, "bfloat16"),
}
PROMPT, COMPLETION, GROUP = 76, 96, 4


def flags(more):
    """Two prompts with 4 answers each, a prompt in each micro-batch, which is of the toy's usual size."""
    tokens = GROUP * (PROMPT + COMPLETION) if more.get("plain") else PROMPT + GROUP * COMPLETION
    return train_grpo.Args(group_size=GROUP, max_new_tokens=COMPLETION, tis_cap=0.0, micro_batch_tokens=tokens, **more)


def toy_config():
    return AutoConfig.from_pretrained(ROOT / "toy_model")


def simulated(words):
    """In a process of its own, which knows the made-up device from then on: all cases, as JSON on stdout."""
    processor = load_processor(ROOT / "toy_model")
    cases = {name: simulate.moments(
        toy_config(), processor, flags(more), 1, [PROMPT], getattr(torch, dtype), torch.float32, flex=False)
        for name, (more, dtype) in CASES.items()}
    passes = {str(plain): [simulate.count_pass(toy_config(), processor, n, PROMPT, COMPLETION, GROUP, plain)
                           for n in (1, 2, 3)[: 3 - plain]] for plain in (True, False)}
    print(json.dumps([cases, passes]))


@pytest.fixture(scope="module")
def found():
    codes, out, err = fork("simulate", act=simulated)
    assert codes == [0], err[-3000:]
    return json.loads(out.splitlines()[-1])


def measured(more, dtype):
    """What a rank holds between updates on this machine's CPU, and how much more at the most while it updates."""
    processor, args, dtype = load_processor(ROOT / "toy_model"), flags(more), getattr(torch, dtype)
    policy, _ = simulate.start(toy_config(), processor, args, dtype, torch.float32)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, (0.9, 0.95), weight_decay=0.0, fused=True)
    samples = simulate.answers(processor, PROMPT, COMPLETION, 2, GROUP)
    side = int(samples[0].images[0])
    hidden = policy.model.config.get_text_config().hidden_size
    policy.sharing.vision.kept[samples[0].images[0]] = (
        torch.tensor([[1, 2 * side, 2 * side]]), [torch.zeros(side**2, hidden, dtype=dtype)])

    def update():
        train_grpo.update(policy, optimizer, samples, None, None, args)

    update()  # which makes the optimiser's state
    peak = bench.peak_bytes(update)
    kept = [*policy.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in kept), peak


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_simulation_agrees_with_what_a_cpu_allocates(name, found, one_rank):
    """The goal was 15 %; it is within half a per cent."""
    kept, peak = measured(*CASES[name])
    moments = found[0][name]
    rest = moments["rest"]["gpu"]
    assert rest == pytest.approx(kept, rel=0.01)
    assert moments[f"update {PROMPT}"]["gpu"] - rest == pytest.approx(peak, rel=0.02)
    assert moments["step"]["gpu"] <= moments["update " + str(PROMPT)]["gpu"]


@pytest.mark.slow
def test_the_work_grows_by_the_same_for_each_layer(found):
    """Which `work` relies on; and one layer's operations, by hand."""
    text = toy_config().get_text_config()
    layer = simulate.build_model(toy_config(), torch.float32).get_decoder().layers[0]
    linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    last = layer.mlp.down_proj.weight.numel()  # whose output nobody needs again, so that it is not computed again
    (one, two, three), others = (np.array(found[1][plain]) for plain in ("False", "True"))
    assert (two - one).tolist() == (three - two).tolist()
    for plain, (one, two) in (("False", (one, two)), ("True", others)):
        tokens = GROUP * (PROMPT + COMPLETION) if plain == "True" else PROMPT + GROUP * COMPLETION
        seen = simulate.pairs(PROMPT, COMPLETION, GROUP, plain == "True")
        # forward, again, and backward, which is twice a forward, and 2.5 times one of attention
        by_hand = 2 * (linear * (1 + 1 + 2) - last) * tokens + 4 * text.hidden_size * seen * (1 + 1 + 2.5)
        assert (two - one)[0] == pytest.approx(by_hand, rel=1e-6)


def test_pairs_are_those_that_no_mask_hides():
    """Prompts of 2, 2 answers of 2: counted on fingers, 3 + 2 (4 + 3) and 2 (1 + 2 + 3 + 4)."""
    assert simulate.pairs(2, 2, 2, plain=False) == 17
    assert simulate.pairs(2, 2, 2, plain=True) == 20


def test_the_tables_are_made_of_the_raw_files():
    commands, grid = simulate.tables(raw("memory.json")["memory"])
    assert commands in README and grid in RESULTS
    rows = raw("work.json")["work"]
    assert simulate.work_table(rows) in RESULTS
    times = {tokens: [row["times_fewer_operations"] for row in rows if row["completion_tokens"] == tokens]
             for tokens in (400, 2048)}
    assert f"saves {min(times[2048]):.2f} to {max(times[2048]):.2f} times the operations" in RESULTS
    assert f"up to {max(times[400]):.2f} times." in RESULTS


def test_the_readmes_commands_fit_the_card_that_they_name():
    rows, commands = raw("memory.json")["memory"]["commands"], simulate.readme_commands()
    assert [row["words"] for row in rows] == [c["words"] for c in commands], "run python tests/bench.py memory again"
    for row, command in zip(rows, commands):
        assert (row["card"], row["gpus"]) == (command["card"], command["gpus"])
        assert simulate.fits(row, command["args"], row["card"]), row["words"]


def test_what_the_readme_says_of_the_hosts_memory():
    """All weights on a card of 24 GB, with --offload; and images' features, two bytes a number."""
    flags = "--gradient_checkpointing --offload"
    rows = {r["model"]: r for r in raw("memory.json")["memory"]["grid"] if (r["flags"], r["gpus"]) == (flags, 1)}
    args = train_grpo.Args(max_new_tokens=2048, offload=True)
    assert all(simulate.largest_share(row, args, 24) > 0.5 for row in rows.values())
    three, seven = (math.ceil(simulate.host_bytes(rows[model])[0] / 1e9) for model in ("3B", "7B"))
    assert f"on a card of 24 GB, if the host has {three} GB free ({seven} for 7B)" in " ".join(README.split())
    small, large = (2000 * 400 * 2 * bench.SHAPES[model]["hidden_size"] / 1e9 for model in ("3B", "7B"))
    assert f"{small:.1f} GB hold 2,000 of 400 tokens (3B; 7B: {large:.1f})" in " ".join(README.split())


def simulated_again(words):
    processor = simulate.toy_processor()
    row = raw("memory.json")["memory"]["grid"][1]
    args = train_grpo.Args(micro_batch_tokens=8192, max_new_tokens=2048, **simulate.GRID[row["flags"]])
    print(json.dumps([row, {"flags": row["flags"]} | simulate.row_of(row["model"], row["gpus"], args, processor)]))


@pytest.mark.slow
def test_the_raw_file_is_what_the_code_needs_today():
    codes, out, err = fork("simulate", act=simulated_again)
    assert codes == [0], err[-3000:]
    then, now = json.loads(out.splitlines()[-1])
    moments, before = now.pop("moments"), then.pop("moments")
    assert (now, moments.keys()) == (then, before.keys())
    for name, held in moments.items():  # a tensor of an earlier simulation, not yet collected, may be among them
        assert held == pytest.approx(before[name], rel=1e-3, abs=1e7), f"{name}: run python tests/bench.py memory again"
