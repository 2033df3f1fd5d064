"""Real archives -> what is to be packed.

A scan looks at names and tables only, finds every problem that can be found so, and returns a Source: the items in the
order in which they will be stored, and how to load one. Nothing is decoded before packing.
"""
