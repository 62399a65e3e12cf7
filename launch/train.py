"""What torchrun and srun start on every rank: torchrun ... launch/train.py --config FILE key=value ..."""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # All under the guard: Megatron's checkpoint writer spawns a helper process, which imports this file again.
    # A signal to stop waits from here on, through exec and imports, until the run can stop (megatron_fec/stop.py).
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    if "FEC_NODE_ENV" not in os.environ:  # started by hand: take the launchers' environment, then start over
        node_env = Path(__file__).resolve().with_name("node_env.sh")
        os.execvp("bash", ["bash", "-c", '. "$0" && exec "$@"', str(node_env), sys.executable, *sys.argv])

    from megatron_fec.launcher import main

    main()
