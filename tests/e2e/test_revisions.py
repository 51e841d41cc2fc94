"""What the hub has changed is evaluated anew, and what it has not is taken over, also offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import LoopbackHub, run_client
from helpers.releases import (
    RELEASE,
    RELEASE_REPO,
    publish_gpt2,
    publish_lines,
    publish_old_sae,
)

from sae_afa_plugin.activations.text import standard_library_texts

HOOKS = ("blocks.2.hook_resid_pre", "blocks.5.hook_resid_pre")
CODE = """
import json, os
{first}
from sae_afa_plugin import evaluate_release
try:
    results = evaluate_release(
        {release!r}, {hooks!r}, dataset="somebody/text", n_tokens=100, context_size=32, out="out"
    )
    said = results.summary["nmse_mean"].tolist(), results.metadata["fingerprints"]
    print("found", json.dumps([*said, results.metadata["settings"]]))
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as loopback:
        publish_gpt2(loopback.repo("gpt2"))
        for seed, hook in enumerate(HOOKS):
            publish_old_sae(loopback.repo(RELEASE_REPO) / hook, hook, seed)
        rows = [{"text": text} for text in standard_library_texts("train")[:5]]
        publish_lines(loopback.repo("somebody/text", "datasets"), rows)
        yield loopback


def test_a_changed_repository_is_noticed(hub: LoopbackHub, tmp_path: Path) -> None:
    def evaluate(first: str = "") -> tuple[str, Any]:
        code = CODE.format(first=first, release=RELEASE, hooks=list(HOOKS))
        out = run_client(hub, code, tmp_path)
        found = [line for line in out.splitlines() if line.startswith("found ")]
        return out, json.loads(found[0][6:]) if found else None

    _, (numbers, fingerprints, settings) = evaluate()
    assert all(len(fingerprints[hook].split("@")[1]) == 40 for hook in HOOKS)
    assert len(settings["model_revision"]) == len(settings["dataset_revision"]) == 40

    out, found = evaluate("os.environ['HF_HUB_OFFLINE'] = '1'")
    assert "2 SAEs were finished before, 0 are to do" in out
    assert found == [numbers, fingerprints, settings]

    publish_old_sae(hub.repo(RELEASE_REPO) / "another", HOOKS[0], 5)
    (hub.repo(RELEASE_REPO) / "another/cfg.json").rename(
        hub.repo(RELEASE_REPO) / HOOKS[0] / "cfg.json"
    )
    weights = hub.repo(RELEASE_REPO) / "another/sae_weights.safetensors"
    weights.rename(hub.repo(RELEASE_REPO) / HOOKS[0] / weights.name)
    out, (changed, *_) = evaluate()
    assert f"{HOOKS[0]} has changed since, and is evaluated again" in out
    assert changed[0] != numbers[0]
    assert changed[1] == numbers[1]

    (hub.repo("gpt2") / "README.md").write_text("Another commit.")
    out, found = evaluate()
    assert found is None
    assert f"model_revision was '{settings['model_revision']}' and is '" in out
