"""Studies: arms, tries and seeds as ordinary runs, and tables made from what they left."""
