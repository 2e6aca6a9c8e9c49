"""Records without a GPU which kernels the operations launch, and with which arguments."""
