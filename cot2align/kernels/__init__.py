"""The optimal-transport loss and its kernels: tensors in, tensors out."""
