"""What every Python process does first that the tests start: most of its time would be that of loading the libraries."""

import atexit
import gc
import sys

# The search for cycles among the modules being loaded, and once more at the end, is a quarter of it.
gc.set_threshold(20_000, 50, 50)
atexit.register(gc.freeze)
# PEFT loads it wherever it is installed, and it loads PyTorch's compiler: nearly a fifth. Those who quantize are tested in the tests' own process.
sys.modules["bitsandbytes"] = None
