"""What a model is fed: --input SPEC becomes batches."""
