"""Prompt-cache affinity: a request goes where its prompt is cached already, unless waiting there costs more.

May import: `registry`, `broker`, `protocol`, `errors`. Read in this order: `affinity` (what a router calls),
`prefixes`, `index`, `load`, `lengths`, `lanes`, `choose`, `outcome`, `kept_prompts`, `warming`.
"""
