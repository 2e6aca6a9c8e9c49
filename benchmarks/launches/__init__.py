"""Which kernels the operations launch, with what, recorded without a GPU."""
