"""Recipes of image classifiers: trained, pruned, retrained and measured; a recipe with the key `images` is one."""
