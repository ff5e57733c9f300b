"""What the kernels compute, as functions of tensors that autograd and torch.compile know."""
