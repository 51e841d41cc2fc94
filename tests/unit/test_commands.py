"""The command line as options, and options as the command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from dataclasses import fields as dataclass_fields

from hypothesis import given
from hypothesis import strategies as st

from sae_afa_plugin import cli
from sae_afa_plugin.activations.language_model import Reading
from sae_afa_plugin.activations.tokens import PROTOCOLS, Protocol
from sae_afa_plugin.commands import evaluation_given, option_arguments
from sae_afa_plugin.evaluation import Evaluation
from sae_afa_plugin.options import options_of


def words(alphabet):
    """Any but "--" alone, which argparse loses in Python 3.10."""
    return st.text(alphabet, min_size=1).filter(lambda text: text != "--")


WHOLE = st.integers(1, 2**63 - 1)
# one strategy for each option there is: a new option without one fails below
VALUES = {
    "model": words("abc/-= '\""),
    "dataset": words("abc/-= '$"),
    "dataset_config": st.none() | words("abc-"),
    "split": words("abc[:]%-"),
    "n_tokens": WHOLE,
    "context_size": WHOLE,
    "prepend_bos": st.none() | st.booleans(),
    "positions": st.none() | st.sampled_from(["all", "last", "-1:", "0:9:2", ":1"]),
    "concatenate": st.none() | st.booleans(),
    "separator": st.none()
    | st.sampled_from(["bos", "eos", "sep", "none"])
    | st.integers(0, 2**31 - 1),
    "exclude_special_tokens": st.booleans() | st.lists(st.integers(0, 2**31 - 1)).map(tuple),
    "subset": st.none() | words("abc '-"),
    "shuffle": st.booleans(),
    "seed": st.integers(0, 2**63 - 1),
    "batch_size_prompts": WHOLE,
    "memory_budget": st.integers(1, 1 << 50),
    "device": st.none() | st.sampled_from(["cpu", "meta"]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "coherence": st.booleans(),
    "core": st.booleans(),
    "core_tokens": WHOLE,
    "trust_remote_code": st.booleans(),
    "progress": st.booleans(),
}


@given(st.fixed_dictionaries(VALUES))
def test_settings_to_command_to_settings_is_the_identity(options):
    arguments = option_arguments({"options": json.loads(json.dumps(options))})
    args = cli._parser().parse_args(["evaluate", "release", *arguments])
    given = evaluation_given(args)
    protocol = asdict(PROTOCOLS[given.pop("protocol", "default")])
    defaults = {**asdict(Reading()), **asdict(Evaluation()), **protocol}
    assert {**defaults, **given} == options


def test_every_option_has_its_values_above():
    fields = [f.name for cls in (Reading, Protocol, Evaluation) for f in dataclass_fields(cls)]
    assert sorted(VALUES) == sorted(fields)
    explained = cli._parser()._subparsers._group_actions[0].choices["evaluate"].format_help()
    for cls in (Reading, Protocol, Evaluation):
        for option in options_of(cls):
            assert len(option.meaning) > 10, option.field.name
            assert option.name in explained
