"""What is trained: a task says what a batch is, what its loss is, and how it is evaluated and exported."""
