"""A calibration that is killed (SIGKILL) between two steps and goes on from its state to the same result."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_calibrate import without_times

from turboattention.calibration.calibrate import calibrate
from turboattention.calibration.settings import Settings
from turboattention.integrations.models import LoadedModel

SETTINGS = Settings(tokens=512, window=128, held_out_tokens=128, probes=0, curve=False)
CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tiny import CONTEXT, character_tokenizer, tiny_llama
from test_killed import SETTINGS
from turboattention.calibration.calibrate import calibrate
from turboattention.integrations.models import LoadedModel
torch.manual_seed(0)
loaded = LoadedModel(tiny_llama(heads=4, kv_heads=2, spread=0.15), character_tokenizer(), "tiny", CONTEXT)
calibrate(loaded, [Path(x) for x in sys.argv[2:]], "bits=4", settings=SETTINGS, state=Path(sys.argv[1]))
"""


def test_a_killed_calibration_goes_on(loaded: LoadedModel, texts: list[Path], tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(state), *map(str, texts)], env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    size = state.stat().st_size
    found = calibrate(loaded, texts, "bits=4", settings=SETTINGS, state=state)
    assert state.stat().st_size > size  # what was missing was added, not begun anew
    assert without_times(found) == without_times(calibrate(loaded, texts, "bits=4", settings=SETTINGS))
