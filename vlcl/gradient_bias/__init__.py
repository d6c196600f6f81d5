"""`vlcl bias`: mini-batch gradients of a checkpoint against the exact one, and what a table can bring."""
