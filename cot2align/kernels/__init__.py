"""The optimal-transport loss and its kernels: tensors in, tensors out; nothing here knows a model or a text."""
