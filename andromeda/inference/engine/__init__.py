"""Many texts at a time: continuous batching over a paged cache. Policy without tensors, tensors without policy."""
