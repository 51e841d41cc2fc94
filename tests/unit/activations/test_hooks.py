"""What is said of hooks that an SAE cannot read."""

from __future__ import annotations

import pytest
import torch

from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.hooks import check_hook, hook_shapes

SWITCHES = {
    "blocks.1.attn.hook_result": "set_use_attn_result",
    "blocks.1.hook_attn_in": "set_use_attn_in",
    "blocks.1.hook_mlp_in": "set_use_hook_mlp_in",
    "blocks.1.hook_q_input": "set_use_split_qkv_input",
    "blocks.1.hook_v_input": "set_use_split_qkv_input",
}


@pytest.mark.parametrize(("hook", "switch"), SWITCHES.items())
def test_a_hook_that_is_switched_off_is_said_with_its_switch(hook, switch):
    model = load_embedded_model()
    with pytest.raises(ValueError, match=rf"has the hook '{hook}', but .*model\.{switch}\(True\)"):
        check_hook(model, hook, 192)
    getattr(model, switch)(True)  # as the sentence says
    shape = hook_shapes(model, [hook])[hook]
    check_hook(model, hook, shape.numel())


def test_near_names_are_others():
    with pytest.raises(ValueError, match="no hook 'blocks.1.hook_resid_prr': did you mean 'blocks"):
        check_hook(load_embedded_model(), "blocks.1.hook_resid_prr", 192)


def test_another_width_is_said():
    with pytest.raises(ValueError, match="have width 192, but the SAE has d_in=20"):
        check_hook(load_embedded_model(), "blocks.1.hook_resid_pre", 20)
    assert hook_shapes(load_embedded_model(), ["blocks.1.hook_resid_pre"]) == {
        "blocks.1.hook_resid_pre": torch.Size([192])
    }
