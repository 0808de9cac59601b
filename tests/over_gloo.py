"""Runs a script, with its arguments, in which DeepSpeed talks over gloo alone, as where it cannot compile its own way between processes of a machine.

That takes two cores most of a minute, for what GPUs do not use.
"""

import runpy
import sys

import deepspeed.ops

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__ = {}
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
