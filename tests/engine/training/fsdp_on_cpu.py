"""`medgpt …` as one process of a run whose weights torch shards with FSDP2 on processors.

torch can, over gloo; accelerate looks at the kind of device and copies the weights instead. Here it is told
otherwise, so that what medgpt does with sharded weights runs where there is no GPU. With `silently` in front nothing
is told: the run is what a user would get if medgpt did not look.
"""

from __future__ import annotations

import sys

from medicalgpt_cli.engine.run.quiet import quieten

quieten()

from accelerate.state import AcceleratorState, DistributedType  # noqa: E402

from medicalgpt_cli.app import main  # noqa: E402
from medicalgpt_cli.engine.training import sharding  # noqa: E402


def shard_on_processors() -> None:
    made = AcceleratorState.__init__

    def init(self, *positional, fsdp_plugin=None, **named) -> None:
        made(self, *positional, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    if sys.argv[1] == "silently":
        del sys.argv[1]
    else:
        shard_on_processors()
    sharding.check_combination = lambda *_: None
    main()
