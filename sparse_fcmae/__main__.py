"""`python -m sparse_fcmae` is `sparse-fcmae`; so torchrun can start it: `torchrun -m sparse_fcmae pretrain ...`."""

from sparse_fcmae.cli import main

main()
