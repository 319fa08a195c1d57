"""The training loop, one for every task, and what it is made of."""
