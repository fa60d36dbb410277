"""What ppo.patch promises, checked where it is applied: tests/test_ppo.py runs this file in a copy of the tree."""

import math
from dataclasses import replace

import pytest
import torch

import train_grpo
import utils
from conftest import answered, branching
from policy import collate, Policy

NAN = math.nan
ARGS = train_grpo.Args(advantage="gae", max_grad_norm=math.inf, tis_cap=0.0)


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------
# GAE


def table(*rows):
    """Rows of numbers with NaN after their end, which is what must not leak in; and where they stand."""
    width = max(map(len, rows))
    filled = torch.tensor([[*row, *[NAN] * (width - len(row))] for row in rows])
    return filled, ~filled.isnan()


@pytest.mark.parametrize("gamma, lam, want", [
    (1, 1, [[0.8, 0.6, 0.5], [-0.3], [1.0, -0.5]]),  # the reward less the value
    (1, 0, [[0.2, 0.1, 0.5], [-0.3], [1.5, -0.5]]),  # the next value less this one
    (1, 0.5, [[0.375, 0.35, 0.5], [-0.3], [1.25, -0.5]]),  # 0.2 + (0.1 + 0.5 / 2) / 2, 1.5 - 0.5 / 2
    (0.5, 0.5, [[-0.00625, -0.025, 0.5], [-0.3], [1.125, -0.5]])])  # d = 0, -0.15, 0.5; 1.25, -0.5
def test_gae_by_hand(gamma, lam, want):
    """Answers of 3, 1 and 2 tokens, of which the first is right; in one table, and each alone."""
    rewards, mask = table([0.0, 0.0, 1.0], [0.0], [0.0, 0.0])
    values, _ = table([0.2, 0.4, 0.5], [0.3], [-1.0, 0.5])
    advantages, returns = train_grpo.gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(want):
        n = len(row)
        close(advantages[i], [*row, *[0.0] * (3 - n)])
        close(returns[i, :n], advantages[i, :n] + values[i, :n])
        assert (returns[i, n:] == 0).all()
        alone = train_grpo.gae(*(x[i : i + 1, :n] for x in (rewards, values, mask)), gamma, lam)
        close(alone[0][0], row)
    assert lam < 1 or gamma < 1 or returns[mask].tolist() == pytest.approx([1, 1, 1, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_sum_of_its_definition(seed):
    """Equation 16 term by term, in float64, with a reward at each token."""
    generator = torch.Generator().manual_seed(seed)
    gamma, lam = torch.rand(2, generator=generator).tolist()
    lengths = torch.randint(1, 20, (7,), generator=generator).tolist()
    rewards, values = (torch.randn(7, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    advantages, returns = train_grpo.gae(rewards, values, mask, gamma, lam)
    for i, T in enumerate(lengths):
        V = [*values[i, :T].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * V[t + 1] - V[t] for t in range(T)]
        want = [sum((gamma * lam) ** k * delta[t + k] for k in range(T - t)) for t in range(T)]
        close(advantages[i, :T], want, 1e-12)
        close(returns[i, :T], [a + v for a, v in zip(want, V)], 1e-12)
        assert not advantages[i, T:].any() and not returns[i, T:].any()


# ---------------------------------------------------------------------------------------------
# What the critic is told, and its loss


def test_the_targets_by_hand(qwen, one_rank):
    """A right answer of one token, a wrong one of two, one that was not scored; the critic knows nothing yet."""
    samples = [replace(qwen.samples[0], id=str(i), reward=r, completion_ids=[9] * n)
               for i, (r, n) in enumerate([(1.0, 1), (0.0, 2), (None, 3)])]
    train_grpo.set_advantages(samples, 1, "gae")
    high = 0.5 / (0.5**0.5 + 1e-4)  # 1 and 0 over their batch
    assert [s.advantage for s in samples] == pytest.approx([high, -high, 0], abs=1e-6)
    assert [train_grpo.teaches(s, ARGS) for s in samples] == [True, True, False]
    values = {id(s): [0.0] * len(s.completion_ids) for s in samples[:2]} | {id(samples[2]): [5.0] * 3}
    advantages, returns = train_grpo.critic_targets(samples, values, ARGS)
    assert [returns[id(s)] for s in samples[:2]] == [pytest.approx(x, abs=1e-6) for x in ([high], [-high, -high])]
    spread = torch.tensor([high, -high, -high]).std().item() + 1e-4  # over tokens, of which two are wrong
    want = [[4 / 3 * high / spread], [-2 / 3 * high / spread] * 2, [0.0] * 3]
    assert [advantages[id(s)] for s in samples] == [pytest.approx(x, abs=1e-5) for x in want]
    assert [*map(len, returns.values())] == [1, 2, 3]


def test_the_rewards_come_with_the_last_token(qwen, one_rank):
    """With lambda 0 every other token is told the next value."""
    samples = [replace(qwen.samples[0], id=str(i), reward=r, completion_ids=[9] * 3) for i, r in enumerate([1.0, 0.0])]
    train_grpo.set_advantages(samples, 1, "gae")
    values = {id(s): [0.1, 0.2, 0.4] for s in samples}
    _, returns = train_grpo.critic_targets(samples, values, replace(ARGS, gae_lambda=0.0, gamma=0.5))
    for s in samples:
        assert returns[id(s)] == pytest.approx([0.1, 0.2, s.advantage], abs=1e-6)


def test_advantages_are_whitened_over_all_ranks(qwen, monkeypatch):
    """The two answers above, one a rank."""
    samples = [replace(qwen.samples[0], id=str(i), reward=r, completion_ids=[9] * n, advantage=r)
               for i, (r, n) in enumerate([(1.0, 1), (-1.0, 2)])]
    for name, value in (("world_size", 2), ("rank", 1)):
        monkeypatch.setattr(train_grpo, name, lambda value=value: value)
    other = torch.full((1, ARGS.max_new_tokens), NAN)
    other[0, 0] = 1.0
    monkeypatch.setattr(utils, "gather", lambda mine: [other, *mine])
    values = {id(samples[1]): [0.0, 0.0]}
    advantages, _ = train_grpo.critic_targets(samples[1:], values, ARGS)
    assert advantages[id(samples[1])] == pytest.approx([-2 / 3 / (4 / 3) ** 0.5] * 2, abs=1e-3)


def test_value_loss_by_hand():
    """Halves of 1, 4 and 0.25, and nothing from padding; its slope is the error."""
    values = torch.tensor([[1.0, -1.0], [0.5, NAN]], requires_grad=True)
    returns, mask = torch.tensor([[0.0, 1.0], [0.0, 7.0]]), torch.tensor([[True, True], [True, False]])
    losses = train_grpo.value_loss(values, returns, mask)
    close(losses.detach(), [[0.5, 2.0], [0.125, 0.0]])
    losses.sum().backward()
    close(values.grad, [[1.0, -2.0], [0.5, 0.0]])


def test_the_metrics_by_hand():
    """Returns 1 1 0 0 spread by 1/4; errors of 1/2 on one token leave 1/16 a token: three quarters are explained."""
    sums = dict.fromkeys(("completions", "groups", "update_tokens"), 4) | dict.fromkeys((
        "tokens", "groups_all_alike", "loss", "divisor", "entropy", "sampler_gap", "sampler_gap_clipped", "sampler_ratio",
        "sampler_ratio_squared", "truncated", "unscored"), 0)
    found = train_grpo.step_metrics(sums | {"value_loss": 1 / 8, "returns": 2, "returns_squared": 2}, [1.0], {}, 1e-4)
    assert (found["value_loss"], found["explained_variance"]) == (1 / 32, 0.75)
    found = train_grpo.step_metrics(sums | {"value_loss": 1 / 8, "returns": 4, "returns_squared": 4}, [1.0], {}, 1e-4)
    assert found["explained_variance"] is None  # returns that are all alike explain themselves
    assert "value_loss" not in train_grpo.step_metrics(sums, [1.0], {}, 1e-4)


# ---------------------------------------------------------------------------------------------
# The head, and the update


def critic_of(kind, tiny, size=0.1):
    """A policy of this kind, whose critic has weights already."""
    policy = branching(tiny.model, tiny.processor) if kind == "packed" else Policy(tiny.model, tiny.processor)
    policy.critic = Policy(tiny.model, tiny.processor, critic=True).critic
    assert policy.critic.shape == (128,) and not policy.critic.any()  # it begins at 0
    weights = torch.randn(128, generator=torch.Generator().manual_seed(1))
    policy.critic.data = size * weights
    return policy


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_value_is_of_the_state_before_its_token(qwen, kind):
    """Against each row's own forward: the state at the last token of the prompt gives the first token's value."""
    samples, policy = answered(qwen.samples, qwen.processor), critic_of(kind, qwen)
    with torch.no_grad():
        *usual, values = policy(policy.batch(samples), 1.0, True)
        again = policy(policy.batch(samples), 1.0)
        for s, row in zip(samples, values):
            inputs = collate([s], qwen.processor)["inputs"]
            states = qwen.model.base_model(**inputs).last_hidden_state[0]  # (L, H)
            first, n = len(s.prompt_ids) - 1, len(s.completion_ids)
            close(row[:n], states[first : first + n] @ policy.critic, 1e-4)
            assert not row[n:].any()
    assert len(again) == 2 and all(torch.equal(a, b) for a, b in zip(again, usual))


class Kept:
    """An optimiser that changes nothing and keeps the gradients it was given."""

    def __init__(self, policy):
        self.policy = policy

    def step(self):
        self.gradients = {n: p.grad.clone() for n, p in self.policy.named_parameters() if p.grad is not None}

    def zero_grad(self):
        self.policy.zero_grad()


def trajectory(policy, samples, args):
    """Rewards of all kinds, one of them not scored; the values and targets that Step III makes of them."""
    for i, s in enumerate(samples):
        s.reward = [1.0, 0.0, None, 0.4][i % 4]
    train_grpo.set_advantages(samples, 1, "gae")
    values = train_grpo.logprob_pass(policy, samples, args, True, True)
    return train_grpo.critic_targets(samples, values, args)


def test_the_gradient_depends_on_no_way_of_computing_it(qwen, one_rank):
    """Plain or packed, in one micro-batch or many: and it is that of the loss written out, summed by hand."""
    samples, args = answered(qwen.samples, qwen.processor), replace(ARGS, gae_lambda=0.9, value_coef=0.3)
    found = {}
    for kind in ("plain", "packed"):
        for budget in (1, 150, 16384):
            policy, asked = critic_of(kind, qwen), replace(args, micro_batch_tokens=budget)
            kept, targets = Kept(policy), trajectory(policy, samples, asked)
            sums, _, _ = train_grpo.update(policy, kept, samples, None, None, asked, targets)
            found[kind, budget] = kept.gradients, sums["value_loss"], sums["loss"]
    policy = critic_of("plain", qwen)
    advantages, returns = trajectory(policy, samples, args)
    total, error = 0.0, 0.0
    for s in samples:  # each row by itself
        logprobs, _, values = policy(policy.batch([s]), 1.0, True)
        if s.reward is not None:
            wrong = (values[0] - torch.tensor(returns[id(s)])).square() / 2
            total -= ((logprobs[0] - logprobs[0].detach()).exp() * torch.tensor(advantages[id(s)])).sum()
            total += args.value_coef * wrong.sum()
            error += wrong.sum().item()
    (total / sum(len(s.completion_ids) for s in samples)).backward()
    want = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    largest = max(g.abs().max().item() for g in want.values())
    assert want["critic"].abs().max() > 1e-3 and error > 0.1
    for place, (gradients, value_loss, loss) in found.items():
        assert gradients.keys() == want.keys()
        worst = max((gradients[n] - want[n]).abs().max().item() for n in want)
        assert worst < 1e-4 * max(1, largest), (place, worst, largest)
        assert (value_loss, loss) == pytest.approx((error, total.item()), rel=1e-3, abs=1e-4), place


def test_the_critics_loss_reaches_the_trunk(qwen, one_rank):
    """Its share of the gradient grows with --value_coef; with 0 the critic learns nothing."""
    samples = answered(qwen.samples[:4], qwen.processor)
    policy, norms = critic_of("plain", qwen), {}
    for coef in (0.0, 1.0, 2.0):
        args, kept = replace(ARGS, value_coef=coef), Kept(policy)
        targets = trajectory(policy, samples, args)
        train_grpo.update(policy, kept, samples, None, None, args, targets)
        norms[coef] = kept.gradients
    assert not norms[0.0]["critic"].any() and norms[1.0]["critic"].any()
    for name in norms[0.0]:  # linear in it
        close(norms[2.0][name] - norms[0.0][name], 2 * (norms[1.0][name] - norms[0.0][name]), 1e-4)
    assert any((norms[1.0][n] - norms[0.0][n]).abs().max() > 1e-3 for n in norms[0.0] if "layers" in n)
