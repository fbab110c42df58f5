"""What the command line runs: recipes, run folders and jobs."""
