"""What srun starts on every node before the ranks: srun --ntasks-per-node=1 launch/doctor.py --config FILE key=value ..."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # All under the guard: the test of a node's GPUs spawns processes, which import this file again.
    if "FEC_NODE_ENV" not in os.environ:  # started by hand: take the launchers' environment, then start over
        node_env = Path(__file__).resolve().with_name("node_env.sh")
        os.execvp("bash", ["bash", "-c", '. "$0" && exec "$@"', str(node_env), sys.executable, *sys.argv])

    from megatron_fec.doctor import main

    main()
