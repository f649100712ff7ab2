"""HOW it is computed: the plan (decisions), and the program that follows from graph and plan."""
