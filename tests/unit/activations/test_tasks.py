"""Prompts with labels: what edits change, what is refused, how activations are put in place."""

from __future__ import annotations

import pytest
import torch
from helpers.models import gpt2_tokenizer, tiny_hooked_sae_transformer

from sae_afa_plugin.activations.base import Site
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.known_tasks import agreement_task, bracket_task, ioi_task
from sae_afa_plugin.activations.tasks import Edit, LabelledTask, write_task


@pytest.fixture(scope="module")
def model():
    return load_embedded_model()


def texts(model, tokens):
    return [model.tokenizer.decode(row[1:].tolist()) for row in tokens]


def test_agreement(model):
    task = agreement_task(model, n_prompts=50)
    assert len(task.tokens) == 50
    assert (task.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    edit = task.edits["number"]
    assert len(set(texts(model, task.tokens))) == 50
    for before, after, answer, other, *values in zip(
        texts(model, task.tokens), texts(model, edit.tokens), task.answers, edit.answers,
        task.attributes["number"], edit.values, strict=True,
    ):  # fmt: skip
        assert sorted(values) == ["plural", "singular"]
        plural, singular = (before, after) if values[0] == "plural" else (after, before)
        assert plural == f"{singular}s"
        answers = [model.tokenizer.decode(int(one)) for one in (answer, other)]
        assert answers == ([" are", " is"] if values[0] == "plural" else [" is", " are"])


def test_brackets(model):
    task = bracket_task(model, n_prompts=60)
    assert {len(values) for values in task.attributes.values()} == {60}
    edit = task.edits["bracket"]
    for before, after, answer, other in zip(
        texts(model, task.tokens),
        texts(model, edit.tokens),
        task.answers,
        edit.answers,
        strict=True,
    ):
        opening = next(sign for sign in before if sign in "([{")
        instead = next(sign for sign in after if sign in "([{")
        assert after == before.replace(opening, instead)
        assert opening + model.tokenizer.decode(int(answer)) in ("()", "[]", "{}")
        assert instead + model.tokenizer.decode(int(other)) in ("()", "[]", "{}")


def test_ioi_with_a_tokenizer_that_has_the_names():
    class Words:  # one token for each word
        bos_token_id = None

        def __init__(self):
            self.known = {}

        def __call__(self, text, add_special_tokens):
            ids = [self.known.setdefault(word, len(self.known)) for word in text.split()]
            return {"input_ids": ids}

    class Model:
        tokenizer = Words()

    task = ioi_task(Model(), n_prompts=80, n_names=4)
    words = {number: word for word, number in Model.tokenizer.known.items()}
    edit = task.edits["io"]
    for row, other, answer, io, subject in zip(
        task.tokens, edit.tokens, task.answers, task.attributes["io"], task.attributes["subject"],
        strict=True,
    ):  # fmt: skip
        names = [words[int(token)] for token in row if words[int(token)] in (io, subject)]
        assert sorted(names) == sorted([io, subject, subject])
        assert words[int(answer)] == io
        assert int((row != other).sum()) == 1
    assert "Tom" in {*edit.values, *task.attributes["subject"]}


def test_the_seed_decides(model):
    one, same, other = (bracket_task(model, 20, seed) for seed in (3, 3, 4))
    assert one.identity == same.identity != other.identity


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            lambda a, b: ("x" * int(b), " is"),
            "prompts must have equally many tokens: 'x' has 1, 'xx",
        ),
        (lambda a, b: ("x", " unusually"), r"an answer must be one token: ' unusually' is \d"),
        (lambda a, b: ("x", " is"), "the edit of 'a' must change its value and the answer"),
    ],
)
def test_templates_that_are_refused(model, write, says):
    values = {"a": ["1", "2"], "b": ["1", "2"]}
    with pytest.raises(ValueError, match=says):
        write_task(model, write, values, ["a"])


def task(**changed):
    fields = {
        "tokens": torch.arange(8).view(4, 2),
        "answers": torch.tensor([0, 1, 0, 1]),
        "attributes": {"a": ["u", "v", "u", "v"]},
        "edits": {
            "a": Edit(torch.arange(8).view(4, 2), ["v", "u", "v", "u"], torch.tensor([1, 0, 1, 0]))
        },
    }
    return LabelledTask(**{**fields, **changed})


EDIT = task().edits["a"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tokens": torch.zeros(3, 2)}, r"4 prompts or more: got shape \(3, 2\)"),
        ({"edits": {}}, "edits must have an attribute"),
        ({"edits": {"b": EDIT}}, r"an edit of 'b', but the attributes are \['a'\]"),
        ({"position": 2}, "position must be in prompts of 2: got 2"),
        ({"answers": torch.zeros(3)}, "answers must have one entry for each of 4 prompts: got 3"),
        ({"attributes": {"a": ["u"] * 4}}, "'a' has the same value in every prompt"),
        (
            {"edits": {"a": EDIT._replace(tokens=torch.zeros(4, 3))}},
            r"prompts of shape \(4, 2\): got \(4, 3\)",
        ),
        (
            {"edits": {"a": EDIT._replace(values=["v", "u", "v", "w"])}},
            r"the edit of 'a' has values that no prompt has: \['w'\]",
        ),
        ({"edits": {"a": EDIT._replace(values=["u", "u", "v", "u"])}}, "must change its value"),
    ],
)
def test_tasks_that_are_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        task(**changed)


@pytest.mark.parametrize(
    ("hook", "head", "width"),
    [("blocks.1.hook_resid_pre", None, 16), ("blocks.0.attn.hook_z", None, 16),
     ("blocks.0.attn.hook_z", 2, 4)],
)  # fmt: skip
def test_an_activation_is_put_in_place(hook, head, width):
    model, site = tiny_hooked_sae_transformer(), Site(hook, head)
    one = task()
    tokens = torch.randint(0, 50, (5, 6), generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(10).view(5, 2)
    x, logits = one.run(model, site, tokens, wanted, batch_size=2)
    assert x.shape == (5, width)
    expected, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected[:, -1].gather(1, wanted))
    acts = cache[hook][:, -1] if head is None else cache[hook][:, -1, head]
    torch.testing.assert_close(x, acts.flatten(1))
    # an activation in its own place changes nothing, another one does
    torch.testing.assert_close(one.run(model, site, tokens, wanted, x)[1], logits)
    other = one.run(model, site, tokens, wanted, x.flip(0), batch_size=3)[1]
    assert not torch.allclose(other, logits)

    def put(acts, hook):
        part = acts if head is None else acts[:, :, head]
        part[:, -1] = x.flip(0).view_as(part[:, -1])
        return acts

    by_hand = model.run_with_hooks(tokens, fwd_hooks=[(hook, put)])[:, -1].gather(1, wanted)
    torch.testing.assert_close(other, by_hand)


def test_the_tokenizer_of_gpt2_is_taken_without_its_special_tokens():
    class Model:
        tokenizer = gpt2_tokenizer()

    task = write_task(
        Model(),
        lambda sign, name: (f"{sign[0]}{name}", sign[1]),
        {"sign": ["()", "[]"], "name": ["a", "b"]},
        ["sign"],
        prepend_bos=False,
    )
    assert task.tokens.shape == (4, 2)
