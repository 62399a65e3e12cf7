"""One rollout server: launch/serve.py --config FILE --bind ADDRESS --port PORT key=value ..."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # All under the guard: vLLM's workers of tensor parallelism import this file again.
    if "FEC_NODE_ENV" not in os.environ:  # started by hand: take the launchers' environment, then start over
        node_env = Path(__file__).resolve().with_name("node_env.sh")
        os.execvp("bash", ["bash", "-c", '. "$0" && exec "$@"', str(node_env), sys.executable, *sys.argv])

    from megatron_fec.serving import main

    main()
