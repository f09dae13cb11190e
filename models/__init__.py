"""What turns pixels into scores: the resize, the generator, the frozen classifier and the pipeline of all three."""
