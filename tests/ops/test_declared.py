"""The shared suite for every operator without a test file of its own."""

from pathlib import Path

from effvit.ops._op import OPS
from effvit.testing import get_spec
from op_suite import OpSuite

for name in sorted(name for name, op in OPS.items() if op.backward_of is None):
    if not Path(__file__).with_name(f"test_{name}.py").exists():
        title = "Test" + name.title().replace("_", "")
        globals()[title] = type(title, (OpSuite,), {"spec": get_spec(name)})
