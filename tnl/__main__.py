"""``python -m tnl``: the command line, for ``torchrun ... -m tnl pretrain``."""

from tnl.cli import main

main()
