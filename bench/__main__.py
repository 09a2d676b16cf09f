"""python -m bench: our losses beside what people would use instead, on this machine.

python -m bench [--grid quick] [--workloads dpo ...] [--providers eager ...] [--save NAME]     measure, print, plot
                                         first calls side by side, then the rounds; --busy, --fresh, --limit S
python -m bench list                     workloads, providers, grids, and who cannot run here
python -m bench training                 a whole training step, by TRL's and transformers' trainers and by ours
python -m bench static                   bytes, instructions, spills of every kernel, compiled without a GPU
python -m bench host                     the processor's time of calls on a GPU, in plain launches; needs no GPU
python -m bench compare A.json B.json    what got slower, larger or less exact
python -m bench plot FILE.json           the pictures again
python -m bench tables                   the tables of README.md and docs/ from bench/results/
python -m bench targets [FILE.json]      what we want to reach, what was measured, what the models predict
python -m bench tune                     on a GPU: other launch configurations
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # The root goes last, so that no folder of this repository hides an installed package.
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != Path(root)] + [root]
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("run", [])
    if command in ("-h", "--help"):
        print(__doc__)
        sys.exit()
    modules = {"static", "host", "training", "compare", "plots", "tables", "targets", "tune"}
    module = {"plot": "plots"}.get(command, command)
    if module in modules:
        main = importlib.import_module(f"bench.{module}").main
    else:
        from bench.run import main

        arguments = sys.argv[1:]
    sys.exit(main(arguments))
