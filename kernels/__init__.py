"""Kernels: C++ for CPUs (`cpu`). Called by `sparse_fcmae.ops`, which checks the arguments."""
