"""Ctrl-C while the command still imports is one line and status 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

ENTRY = "import sys\nfrom sae_afa_plugin.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
@pytest.mark.parametrize("seconds", [0.2, 0.5, 1, 2])
@pytest.mark.parametrize("how", ["module", "entry point"])
def test_ctrl_c_during_imports(tmp_path, how, seconds):
    script = tmp_path / "sae-afa"
    script.write_text(ENTRY)  # as pip writes it
    command = ["-m", "sae_afa_plugin.cli"] if how == "module" else [str(script)]
    process = subprocess.Popen(
        [sys.executable, *command, "report", str(tmp_path / "nothing")],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "sae-afa: interrupted")


def test_other_programs_keep_their_ctrl_c():
    code = (
        "import signal, sae_afa_plugin; from sae_afa_plugin._interrupt import as_usual; as_usual();"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    subprocess.run([sys.executable, "-c", start + code.replace("as_usual();", "")], check=True)
