"""The group ``supervised`` in a small world where everything is known, and on the embedded model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from torch import nn

from sae_afa_plugin import evaluate_saes
from sae_afa_plugin._upstream import HookedProxyLM
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.known_tasks import agreement_task
from sae_afa_plugin.activations.tasks import Edit, LabelledTask
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.groups.supervised import Supervised, best_f1, exchanged, supervised_directions
from sae_afa_plugin.spaces import DictionaryCode, linear_code

COLOURS, SHAPES, FILLERS = ("red", "blue"), ("circle", "square", "star"), 12
PAIRS = list(
    itertools.product(range(2), range(3))
)  # an answer names both: token 5 + FILLERS + pair
FIRST_ANSWER = 5 + FILLERS


class World(nn.Module):
    """Words add up to the activation; logits are a function of the last one."""

    def __init__(self, embed, bend=lambda x: x):
        super().__init__()
        self.embed, self.bend, self.x = nn.Embedding.from_pretrained(embed), bend, nn.Identity()
        unembed = torch.zeros(embed.shape[1], FIRST_ANSWER + len(PAIRS))
        for number, (colour, shape) in enumerate(PAIRS):
            unembed[:, FIRST_ANSWER + number] = embed[colour] + embed[2 + shape]
        self.unembed = nn.Parameter(unembed)

    def forward(self, tokens):
        return self.bend(self.x(self.embed(tokens).cumsum(1))) @ self.unembed


def exact_world():
    """Five words, five orthogonal directions; fillers say nothing."""
    return World(torch.cat([torch.eye(5), torch.zeros(FILLERS, 5)]))


def task():
    found = list(itertools.product(range(2), range(3), range(FILLERS)))

    def tokens(rows):
        return torch.tensor([[5 + filler, 2 + shape, colour] for colour, shape, filler in rows])

    def answers(rows):
        return torch.tensor([FIRST_ANSWER + PAIRS.index(row[:2]) for row in rows])

    recoloured = [(1 - c, s, f) for c, s, f in found]
    reshaped = [(c, (s + 1 + f % 2) % 3, f) for c, s, f in found]
    return LabelledTask(
        tokens(found),
        answers(found),
        {"colour": [COLOURS[c] for c, _, _ in found], "shape": [SHAPES[s] for _, s, _ in found]},
        {
            "colour": Edit(
                tokens(recoloured), [COLOURS[c] for c, _, _ in recoloured], answers(recoloured)
            ),
            "shape": Edit(tokens(reshaped), [SHAPES[s] for _, s, _ in reshaped], answers(reshaped)),
        },
    )


def sae_of(W_enc, W_dec, b_enc=None, b_dec=None, **config):
    d_sae, d_in = W_dec.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, **config))
    sae.cfg.metadata.hook_name = "x"
    with torch.no_grad():
        sae.W_enc.copy_(W_enc), sae.W_dec.copy_(W_dec)
        sae.b_enc.copy_(torch.zeros(d_sae) if b_enc is None else b_enc)
        sae.b_dec.copy_(torch.zeros(d_in) if b_dec is None else b_dec)
    return sae


def summary_of(sae, world, group):
    source = TensorActivations(
        {"x": torch.randn(4, sae.cfg.d_in)}, model=HookedProxyLM(world, None, ["x"])
    )
    code = linear_code(sae)
    assert group.why_not(code, source) is None
    found = group.start(code, source).finish().summary
    return {name.removeprefix("supervised_"): value for name, value in found.items()}


def halves(group):
    """For each split: the prompts to fit, and those held out."""
    rng = torch.Generator().manual_seed(group.seed)
    n = len(group.task.tokens)
    orders = [torch.randperm(n, generator=rng).numpy() for _ in range(group.n_splits)]
    return [(order[: n // 2], order[n // 2 :]) for order in orders]


# --- by hand ---


def test_the_dictionary_of_the_world_is_as_good_as_labels():
    group = Supervised(task(), codes="mse", n_splits=3)
    found = summary_of(sae_of(torch.eye(5), torch.eye(5)), exact_world(), group)
    expected = {
        "accuracy": 1,
        # nothing is lost
        **dict.fromkeys(("logits", "logits_labels", "variance", "variance_labels"), 1),
        # an edit needs two features: one goes, one comes
        **{f"control_{m}": share for m, share in ((1, 0.5), (2, 1), (4, 1), (8, 1))},
        **{f"control_ratio_{m}": share for m, share in ((1, 0.5), (2, 1), (4, 1), (8, 1))},
        **{"control_labels": 1, "f1": 1, "colour_f1": 1, "shape_f1": 1},
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["control_2_std"] == pytest.approx(0, abs=1e-4)
    # as rare as a value is: 2 p / (p + 1), of two colours and three shapes
    assert found["f1_always"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=0.02)


def test_a_feature_is_missing():
    W_enc = torch.eye(5)
    W_enc[0] = 0  # nothing says red
    group = Supervised(task(), codes="mse", n_splits=3)
    found = summary_of(sae_of(W_enc, torch.eye(5)), exact_world(), group)
    # only blue can come or go: half of every edit
    assert found["colour_control_8"] == pytest.approx(0.5, abs=1e-4)
    assert found["shape_control_8"] == pytest.approx(1, abs=1e-4)
    assert found["control_8"] == pytest.approx(0.75, abs=1e-4)
    assert found["shape_f1"] == 1
    assert found["colour_f1"] < 1
    red = np.array([value == "red" for value in group.task.attributes["colour"]])
    expected = []
    for fit, held in halves(group):
        p, q = red[held].mean(), red[fit].mean()
        ablated = (2 * p - 1) * (2 * q - 1)  # of the difference of 1 that each prompt has
        expected.append((((1 - p) - ablated) / (1 - ablated) + 1) / 2)  # of colours, of shapes
    assert found["logits"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert found["logits_std"] == pytest.approx(np.std(expected, ddof=1), abs=1e-4)


def test_a_feature_is_split():
    # red circles; other red things; blue; the three shapes
    W_enc = torch.tensor(
        [
            [1.0, 0, 1, 0, 0],
            [1, 0, -1, 0, 0],
            [0, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1],
        ]
    ).T
    W_dec = torch.eye(5)[[0, 0, 1, 2, 3, 4]]
    sae = sae_of(W_enc, W_dec, b_enc=torch.tensor([-1.0, 0, 0, 0, 0, 0]))
    group = Supervised(task(), codes="mse", n_exchanged=(2, 3), n_splits=3)
    found = summary_of(sae, exact_world(), group)
    assert found["logits"] == pytest.approx(1, abs=1e-4)
    assert found["colour_control_3"] == pytest.approx(1, abs=1e-4)
    labels = group.task.attributes
    red = np.array([value == "red" for value in labels["colour"]])
    circle = np.array([value == "circle" for value in labels["shape"]])
    shares, f1s = [], []
    for fit, held in halves(group):
        circles = circle[fit][red[fit]].mean()
        best = max(circles, 1 - circles)  # what the one of red's features has that comes first
        p = red[held].mean()
        shares.append(p + (1 - p) * (1 + best) / 2)
        said, true = red[held] & ~circle[held], red[held]
        f1s.append((2 * said.sum() / (said.sum() + true.sum()) + 1) / 2)  # blue: 1
    assert found["colour_control_2"] == pytest.approx(np.mean(shares), abs=1e-4)
    assert found["colour_f1"] == pytest.approx(np.mean(f1s), abs=1e-4)


def test_exchanges_stop_where_they_would_lead_away():
    f, to = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    found = exchanged(f, to, torch.eye(2), torch.tensor([[-0.4, 1.0]]), [1, 3])
    assert found[1].tolist() == found[3].tolist() == [[0.0, 0.0]]


def test_directions_of_values_that_nobody_has():
    x, labels = torch.randn(6, 3), torch.eye(3)[[0, 1, 0, 1, 0, 1]]
    for codes in ("mean", "mse"):
        found = supervised_directions(x, labels, codes)
        torch.testing.assert_close(found[2], torch.zeros(3))
        torch.testing.assert_close(found[0], x[::2].mean(0) - x.mean(0))


def test_f1_by_counting():
    labels = torch.eye(3)[[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]]
    active = torch.tensor(
        [
            [1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0],  # perfect, but only where nothing is chosen
        ]
    )
    found, always = best_f1(active.T.bool(), labels, torch.arange(6), torch.arange(6, 12))
    # feature 0 says the first value (1 right, 1 wrong, 1 missed), feature 1 the second (3, 0, 1)
    assert found.tolist() == pytest.approx([1 / 2, 6 / 7, np.nan], nan_ok=True)
    assert always.tolist() == pytest.approx([4 / 8, 8 / 10, np.nan], nan_ok=True)


# --- against an oracle: one prompt and one feature at a time ---


def oracle(world, sae, group):
    t = group.task
    embed, unembed = world.embed.weight.double().numpy(), world.unembed.detach().double().numpy()
    W_enc, b_enc, W_dec, b_dec = (
        w.detach().double().numpy() for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    n = len(t.tokens)
    x = [embed[row.numpy()].sum(0) for row in t.tokens]
    answers = t.answers.tolist()

    def difference(i, name, at):
        logits = np.tanh(at) @ unembed
        return logits[answers[i]] - logits[int(t.edits[name].answers[i])]

    def encoded(v):
        std = v.std(ddof=1)
        z = (v - v.mean()) / (std + 1e-5)
        return np.maximum((z - b_dec) @ W_enc + b_enc, 0), std

    f, stds = zip(*(encoded(v) for v in x), strict=True)
    rows = []
    for fit, held in halves(group):
        mean = np.mean([x[i] for i in fit], 0)
        codes = {}
        for name, values in t.attributes.items():
            for value in set(values):
                codes[name, value] = np.mean([x[i] for i in fit if values[i] == value], 0) - mean
        if group.codes == "mse":
            keys = sorted(codes)
            design = np.array([[t.attributes[a][i] == v for a, v in keys] for i in fit], float)
            solved = np.linalg.lstsq(design, np.array([x[i] - mean for i in fit]), rcond=None)[0]
            codes = dict(zip(keys, solved, strict=True))
        row = {}
        by = {
            "": lambda i: (f[i] @ W_dec + b_dec) * stds[i] + x[i].mean(),
            "_labels": lambda i, mean=mean, codes=codes: (
                mean + sum(codes[a, of[i]] for a, of in t.attributes.items())
            ),
        }
        for who, recons in by.items():
            shares = []
            for name in t.edits:
                clean, ablated, kept = (
                    np.mean([difference(i, name, at(i)) for i in held])
                    for at in (lambda i: x[i], lambda i, mean=mean: mean, recons)
                )
                shares.append((kept - ablated) / (clean - ablated))
            row[f"logits{who}"] = np.mean(shares)
            errors = sum(((x[i] - recons(i)) ** 2).sum() for i in held)
            row[f"variance{who}"] = 1 - errors / sum(((x[i] - mean) ** 2).sum() for i in held)
        for name, edit in t.edits.items():
            effects = {}
            for i in held:
                new, clean = edit.values[i], difference(i, name, x[i])
                other = embed[edit.tokens[i].numpy()].sum(0)
                wanted = codes[name, new] - codes[name, t.attributes[name][i]]
                effects.setdefault("truth", []).append(clean - difference(i, name, other))
                effects.setdefault("labels", []).append(clean - difference(i, name, x[i] + wanted))
                usual = np.mean([f[j] for j in fit if t.attributes[name][j] == new], 0)
                at, used = x[i], set()
                for m in range(1, 1 + max(group.n_exchanged)):
                    best, nearest = None, np.sum((x[i] + wanted - at) ** 2)
                    for k in set(range(len(usual))) - used:
                        moved = at + stds[i] * (usual[k] - f[i][k]) * W_dec[k]
                        if np.sum((x[i] + wanted - moved) ** 2) < nearest - 1e-9:
                            best, nearest = k, np.sum((x[i] + wanted - moved) ** 2)
                    if best is not None:
                        at, used = (
                            at + stds[i] * (usual[best] - f[i][best]) * W_dec[best],
                            used | {best},
                        )
                    effects.setdefault(m, []).append(clean - difference(i, name, at))
            for who in ("labels", *group.n_exchanged):
                row[f"{name}_control_{who}"] = np.mean(effects[who]) / np.mean(effects["truth"])
        for who in ("labels", *group.n_exchanged):
            row[f"control_{who}"] = np.mean([row[f"{name}_control_{who}"] for name in t.edits])
        for m in group.n_exchanged:
            row[f"control_ratio_{m}"] = row[f"control_{m}"] / row["control_labels"]
        always = []
        for name, values in t.attributes.items():
            found, floor = [], []
            for value in set(values):

                def f1(which, rows, values=values, value=value):
                    said, true = (
                        {i for i in rows if which(i)},
                        {i for i in rows if values[i] == value},
                    )
                    return 2 * len(said & true) / max(1, len(said) + len(true))

                k = max(range(len(b_enc)), key=lambda k: f1(lambda i: f[i][k] > 0, fit))  # noqa: B023
                found.append(f1(lambda i: f[i][k] > 0, held))  # noqa: B023
                floor.append(f1(lambda i: True, held))
            row[f"{name}_f1"] = np.mean(found)
            always.append(np.mean(floor))
        row["f1"] = np.mean([row[f"{name}_f1"] for name in t.attributes])
        row["f1_always"] = np.mean(always)
        rows.append(row)
    clean = [difference(i, name, x[i]) for i in range(n) for name in t.edits]
    found = {"accuracy": np.mean(np.array(clean) > 0)}
    for name in rows[0]:
        numbers = [row[name] for row in rows]
        found |= {name: np.mean(numbers), f"{name}_std": np.std(numbers, ddof=1)}
    return found


@pytest.mark.parametrize("codes", ["mean", "mse"])
def test_everything_by_the_oracle(codes):
    rng = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=rng)

    world = World(torch.cat([random(5, 8), 0.4 * random(FILLERS, 8)]), torch.tanh)
    sae = sae_of(
        random(8, 14), 0.4 * random(14, 8), random(14) - 1, 0.3 * random(8),
        normalize_activations="layer_norm",
    )  # fmt: skip
    group = Supervised(task(), codes=codes, n_exchanged=(1, 3), n_splits=2, seed=1)
    found, expected = summary_of(sae, world, group), oracle(world, sae, group)
    assert set(found) == set(expected)
    assert expected["control_3"] < 0.9
    assert expected["f1"] < 0.9
    assert found == pytest.approx(expected, abs=2e-4)


# --- what is refused ---


def test_a_place_that_decides_nothing():
    world, sae = exact_world(), sae_of(torch.eye(5), torch.eye(5))
    plain = task()
    early = LabelledTask(plain.tokens, plain.answers, plain.attributes, plain.edits, position=0)
    with pytest.raises(ValueError, match=r"the mean at 'x', position 0, takes 0.00 of 1.00 log"):
        summary_of(sae, world, Supervised(early))
    wrong = World(-exact_world().embed.weight)
    with torch.no_grad():
        wrong.unembed.mul_(-1)
    with pytest.raises(ValueError, match="the language model does not do the task"):
        summary_of(sae, wrong, Supervised(task()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "ioi"}, "task must be a LabelledTask"),
        ({"codes": "median"}, "codes must be one of mean, mse"),
        ({"n_splits": 1}, "n_splits must be at least 2"),
        ({"n_exchanged": (2, 0)}, "n_exchanged must be at least 1"),
        ({"n_exchanged": ()}, "n_exchanged must have a number of features"),
    ],
)
def test_settings_that_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Supervised(**{"task": task(), **settings})


def test_an_sae_without_a_known_hook_or_with_two():
    group, source = Supervised(task()), TensorActivations({"x": torch.ones(1, 5)})
    assert "SAE of SAELens" in group.why_not(DictionaryCode(torch.eye(5), torch.relu), source)
    sae = sae_of(torch.eye(5), torch.eye(5))
    sae.cfg.metadata.hook_name_out = "y"
    assert "transcoders" in group.why_not(linear_code(sae), source)


def test_the_task_is_part_of_the_settings():
    one, same = Supervised(task()), Supervised(task())
    assert one.identity == same.identity
    changed = task()
    changed.tokens[0, 0] += 1
    assert Supervised(changed).identity != one.identity
    assert Supervised(task(), n_exchanged=[1]).identity != one.identity


# --- on a model ---


def test_the_embedded_model_and_an_sae_that_loses_nothing():
    model = load_embedded_model()
    eye = torch.eye(192)
    whole = sae_of(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]))  # x = relu(x) - relu(-x)
    blind = sae_of(torch.zeros(192, 4), torch.zeros(4, 192))
    for sae in (whole, blind):
        sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
    group = Supervised(agreement_task(model, n_prompts=60), n_exchanged=(1, 64), n_splits=2)
    found = evaluate_saes(
        {"whole": whole, "blind": blind}, model, "embedded", n_tokens=50, groups=[group],
        progress=False, coherence=False,
    ).summary  # fmt: skip
    assert found.loc["whole", "supervised_accuracy"] > 0.85
    assert found.loc["whole", "supervised_logits"] == pytest.approx(1, abs=1e-3)
    assert found.loc["whole", "supervised_variance"] == pytest.approx(1, abs=1e-3)
    one, many = found.loc["whole", ["supervised_control_1", "supervised_control_64"]]
    labels = found.loc["whole", "supervised_control_labels"]
    assert 0 < one < many < 1.1 * labels
    assert labels > 0.5
    assert found.loc["blind", "supervised_control_64"] == pytest.approx(0, abs=1e-5)
    assert found.loc["blind", "supervised_logits"] < 0.5
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
