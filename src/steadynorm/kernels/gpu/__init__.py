"""What the Triton backends are made of: imported when a tensor needs them, since importing Triton takes a while."""
