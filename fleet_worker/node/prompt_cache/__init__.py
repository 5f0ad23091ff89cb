"""What a node knows about the prompt cache of its MLX server, and about its speed, from requests and their answers.

In reading order: `prompt_cache`, `shadow`, `prefills`, `speeds`, `troubles`, `conversations`.
"""
