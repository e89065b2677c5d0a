"""What goes wrong around normalization in a training loop, made right: one file a subject."""
