"""Other libraries' names and forms of tensors, translated to those of transformers."""
