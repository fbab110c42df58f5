"""Soups of classifiers: recipes with the section `soup`, their members' trainings, the baselines, and the command."""
