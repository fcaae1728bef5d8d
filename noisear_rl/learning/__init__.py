"""What the algorithms share: the run folder, losses as pure functions, and the steps that optimisers take."""
