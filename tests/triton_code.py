"""What tests ask of the Triton kernels' code for a GPU: which kernels, and what triton_compile.py found in them.

The kernels of a test process belong to Triton's interpreter, hence a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def updates(rule, dtypes, **others):
    """The kernels of a step.

    Args:
        dtypes: names of param, grad and of each state as the kernels' constants ask for them; "" for an absent one.
        others: in place of what an ordinary step has; ``machine_code``: whether the cubins are asked for.
    """
    defaults = {"followers": ("", ""), "weight_format": "plain", "maximize": False, "left": "", "optional": False}
    return "update", {"rule": rule, "dtypes": dtypes, **defaults, "capability": 90, **others}


def norms(dtype, **others):
    """The kernel that sums over gradients."""
    defaults = {"first": False, "last": False, "by_max_abs": False, "optional": False}
    return "norm", {"dtype": dtype, **defaults, "capability": 90, **others}


def schedules():
    return "schedule", {"optional": True, "capability": 90}


def code_of(kernels):
    """For each of ``kernels`` what triton_compile.py says of its launches."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(kernels),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])
