"""The page of a run, or of several beside each other: what they were told, how they went, and what they see."""
